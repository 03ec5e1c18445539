"""Measure a model by its configuration, without loading its weights."""

from __future__ import annotations

import functools

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from selfteach.config.recipe import ModelConfig
from selfteach.models.architectures import Shape
from selfteach.models.loading import context_length
from selfteach.models.model_path import resolve


def cached_config(model: ModelConfig, *, fetch: bool = False) -> PreTrainedConfig | None:
    """Return a model's configuration from its folder or the cache; None if it is in neither.

    ``fetch``: also from the hub.
    """
    try:
        if model.gguf_file:
            return _gguf_config(resolve(model.path), model.gguf_file)
        return AutoConfig.from_pretrained(
            resolve(model.path),
            local_files_only=not fetch,
            trust_remote_code=model.trust_remote_code,
        )
    except Exception:  # a damaged file raises anything, and loading will say what is wrong
        return None


def count_parameters(config: PreTrainedConfig) -> int:
    """Count a causal language model's parameters, tied ones once, without memory for them."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert isinstance(model, PreTrainedModel)
    return sum(p.numel() for p in model.parameters())


def shape_of(config: PreTrainedConfig) -> Shape:
    """Convert a transformers configuration to a `Shape`; missing fields take Llama's defaults."""
    text = config.get_text_config()
    heads = text.num_attention_heads
    return Shape(
        family=text.model_type,
        hidden=text.hidden_size,
        intermediate=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        layers=text.num_hidden_layers,
        heads=heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        vocabulary=text.vocab_size,
        positions=context_length(config),
        tied=bool(config.tie_word_embeddings),
    )


@functools.lru_cache(maxsize=2)
def _gguf_config(path: str, gguf_file: str) -> PreTrainedConfig:
    """Read the configuration from a GGUF file, once per process: it takes seconds."""
    return AutoConfig.from_pretrained(path, gguf_file=gguf_file, local_files_only=True)
