"""Load a model's frozen weights in 4 bits (bitsandbytes), as QLoRA does (arXiv:2305.14314).

The linear layers inside the decoder are quantised to NF4, their scales too; embeddings, norms and the
LM head stay as they are. Adapters train on top, in float32. Matmuls dequantise a layer at a time.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig

from selfteach.config.recipe import ModelConfig
from selfteach.errors import EngineError

EXTRA = 'pip install "selfteach[4bit]"'
BLOCK, BLOCKS_PER_SCALE = 64, 256
"""Weights with one scale in 8 bits, and such scales with one of 32 bits."""


def require_library(config: ModelConfig) -> None:
    """Raise `EngineError` if a recipe wants 4-bit weights and bitsandbytes is not installed."""
    if config.quantization is None:
        return
    try:
        version("bitsandbytes")
    except PackageNotFoundError:
        raise EngineError(
            f'model.quantization = "{config.quantization}" needs bitsandbytes: {EXTRA}, or remove '
            "the key"
        ) from None


def loading_options(
    config: ModelConfig, device: torch.device, compute: torch.dtype
) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` that quantise, for matmuls in ``compute``.

    Weights are quantised on their device, one after another: the whole model is never there.
    """
    require_library(config)
    if config.quantization is None:
        return {}
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=config.quantization,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )
    return {"quantization_config": quantization, "device_map": {"": device}}


def quantized_bytes(weights: int) -> int:
    """Return the bytes of so many weights in 4 bits, scales included: 0.516 each."""
    return weights // 2 + weights // BLOCK + 4 * (weights // (BLOCK * BLOCKS_PER_SCALE))


def count_weights(model: nn.Module) -> int:
    """Count a model's weights, also those in 4 bits, of which a tensor has two in each byte."""
    states = ((p, getattr(p, "quant_state", None)) for p in model.parameters())
    return sum(p.numel() if state is None else state.shape.numel() for p, state in states)
