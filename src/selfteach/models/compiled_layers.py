"""Compile a model's decoder layers for the trainer's passes (`torch.compile`), one layer at a time.

Layers are alike, so the graphs of one serve all of them, and shapes are dynamic, so that they serve all
micro-batches. Passes with a cache (a shared prefix, and sampling) run as they are: with it each layer
would have graphs of its own.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from selfteach.models import pass_probe

CACHES = ("cache", "past_key_values", "layer_past")
"""Names of a layer's cache in transformers."""
MOST_GRAPHS = 64
"""Graphs of a layer at most: with and without gradients, adapters, sharing; PyTorch's 8 are too few."""

_log = logging.getLogger(__name__)


def compile_layers(
    model: nn.Module, layers: Sequence[nn.Module], states: Callable[[], Tensor], *, rounded: bool
) -> bool:
    """Compile layers if that leaves the states of a probe, and their gradients, as they are.

    ``states`` computes them [N, H] in grad mode or not. Returns False for a model that then runs as
    before: its compiled layers disagree, or do not compile; the reason is one line on the log.
    """
    before = pass_probe.states_and_gradients(model, layers, states)
    set_compiled(layers)
    try:
        after = pass_probe.states_and_gradients(model, layers, states)
    except Exception as error:  # a compiler raises anything
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    else:
        if pass_probe.agree(after, before, rounded=rounded):
            return True
        reason = "compiled, they compute other states or gradients"
    for layer in layers:
        layer._compiled_call_impl = None
    report_uncompiled(model, reason)
    return False


def report_uncompiled(model: nn.Module, reason: str) -> None:
    """Log in one line why a model runs uncompiled though its recipe asks for it."""
    _log.warning("model.compile: the layers of %s run uncompiled: %s", type(model).__name__, reason)


def set_compiled(layers: Sequence[nn.Module]) -> None:
    """Have layers run compiled in passes with `tree_attention.Paths` and without a cache."""
    from torch._dynamo import config  # takes seconds, for those alone who compile

    warnings.filterwarnings("ignore", "The .grad attribute of a Tensor")  # which the compiler reads
    config.recompile_limit = max(config.recompile_limit, MOST_GRAPHS)
    for layer in layers:
        layer._compiled_call_impl = _switching(layer)


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList | None:
    """Return the list of a model's decoder layers; None if there is none of their number."""
    count = model.config.get_text_config().num_hidden_layers
    lists = (module for module in model.modules() if isinstance(module, nn.ModuleList))
    return next((layers for layers in lists if len(layers) == count), None)


def _switching(layer: nn.Module) -> Callable[..., Any]:
    plain = layer._call_impl
    compiled = torch.compile(plain, dynamic=True)

    def call(*args: Any, **kwargs: Any) -> Any:
        cached = any(kwargs.get(name) is not None for name in CACHES)
        return (plain if cached or kwargs.get("paths") is None else compiled)(*args, **kwargs)

    return call
