"""Change a model for training: add low-rank adapters, compute activations again."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from selfteach.errors import EngineError


def add_adapters(
    model: PreTrainedModel,
    *,
    rank: int,
    alpha: float,
    dropout: float,
    targets: tuple[str, ...],
    seed: int,
) -> PeftModel:
    """Add low-rank adapters to the named modules, initialised from ``seed``.

    Raises `EngineError` if the model has no module of these names.
    """
    linear = {
        name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)
    }
    absent = [t for t in targets if not any(n == t or n.endswith(f".{t}") for n in linear)]
    if absent:
        heads = {name.rpartition(".")[2] for name in linear}
        raise EngineError(
            f"model.lora.targets: {type(model).__name__} has no linear layer named "
            f"{' or '.join(map(repr, absent))}; it has {', '.join(sorted(heads))}"
        )
    torch.manual_seed(seed)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # pyright: ignore[reportArgumentType] - PEFT takes any number
        lora_dropout=dropout,
        target_modules=list(targets),
        task_type="CAUSAL_LM",
    )
    try:
        with without_peft_warnings():
            adapted = get_peft_model(model, config)
    except ValueError as error:
        raise EngineError(f"model.lora.targets = {list(targets)}: {error}") from error
    assert isinstance(adapted, PeftModel)
    return adapted


@contextlib.contextmanager
def without_peft_warnings() -> Iterator[None]:
    """Hide the warning about a deprecated name of transformers, which PEFT uses."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".is_gradient_checkpointing. is deprecated")
        yield


def recompute_activations(model: PreTrainedModel) -> None:
    """Enable gradient checkpointing: layers are computed again in the backward pass."""
    # transformers renames this one too; the old name warns and goes with its version 6.
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})
