"""Compare the ways a model is run with its plain pass: one sequence, no cache, no padding.

A shared prefix, a cache and padding save time. They are exact for most architectures, but not for all:
padding may use up a sliding window, and recurrent layers may read it. So a model proves at build, on a
few tokens, that each way gives the plain pass's result.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from selfteach.errors import EngineError

PROBE_SHARED = 6
"""Tokens that all prompts of a probe share."""
PROBE_WINDOW = 4
"""Length of sliding windows and attention chunks during a probe: its prompts reach past them."""
PROBE_COMPLETION = 5
"""Tokens of a probe's completions."""
_RESTS = (1, 4, 6)
_WINDOWS = (
    "sliding_window", "attention_chunk_size", "attention_window_size", "window_size", "index_topk",
)  # fmt: skip
"""Names of windows in configs of transformers; attention modules may copy them."""
_EXACT_TOLERANCE = 1e-3
_ROUNDED_TOLERANCE = 0.1
"""Largest root mean square difference, relative to the values' standard deviation: with float32, and
with 16-bit matmuls, whose rounding depends on a batch's shape."""


def probe_prompts(vocabulary: int) -> list[list[int]]:
    """Return three prompts of different lengths that begin with the same tokens."""
    generator = torch.Generator().manual_seed(0)
    # Special tokens are at either end of most vocabularies.
    low, high = vocabulary // 4, max(vocabulary // 4 + 2, vocabulary // 2)

    def tokens(count: int) -> list[int]:
        return torch.randint(low, high, (count,), generator=generator).tolist()

    shared = tokens(PROBE_SHARED)
    return [[*shared, *tokens(rest)] for rest in _RESTS]


def plain_logits(causal: PreTrainedModel, ids: Sequence[int]) -> Tensor:
    """Compute the logits [T, V] of one sequence in a pass of its own."""
    device = next(causal.parameters()).device
    return causal(input_ids=torch.tensor([list(ids)], device=device), use_cache=False).logits[0]


def plain_states(causal: PreTrainedModel, ids: Sequence[int]) -> Tensor:
    """Compute the last layer's states [T, H] of one sequence in a pass of its own."""
    device = next(causal.parameters()).device
    return backbone_of(causal)(input_ids=torch.tensor([list(ids)], device=device), use_cache=False)[
        0
    ][0]


def agree(ours: Tensor, plain: Tensor, *, rounded: bool, spread: float = 1.0) -> bool:
    """Return whether two results are the same but for rounding.

    ``spread`` is the standard deviation of such values; ``rounded`` says that matmuls have 16 bits.
    """
    error = float((ours.double() - plain.double()).square().mean().sqrt())
    tolerance = _ROUNDED_TOLERANCE if rounded else _EXACT_TOLERANCE
    return error <= tolerance * max(spread, 1e-9)  # false for NaN


def is_rounded(model: PreTrainedModel, autocast: torch.dtype | None) -> bool:
    """Return whether a model's matmuls have 16 bits."""
    return (autocast or model.dtype) not in (torch.float32, torch.float64)


def attends_to_all(model: PreTrainedModel, max_length: int) -> bool:
    """Return whether each layer attends to all tokens before one, in sequences up to ``max_length``.

    False for sliding windows and chunks within that length, and for recurrent layers.
    """
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    return not _reached(config, max_length) and kinds <= {
        "full_attention", "sliding_attention", "chunked_attention"
    }  # fmt: skip


def _reached(holder: object, max_length: int) -> dict[str, int]:
    """Return the windows of a config or module that are shorter than ``max_length``, by name."""
    lengths = {name: getattr(holder, name, None) for name in _WINDOWS}
    return {
        name: length
        for name, length in lengths.items()
        if isinstance(length, int) and 0 < length < max_length
    }


@contextlib.contextmanager
def shrunk_windows(model: PreTrainedModel, max_length: int) -> Iterator[None]:
    """Shorten windows and chunks that are shorter than ``max_length``: a few tokens reach past them."""
    before = [
        (holder, name, length)
        for holder in (model.config.get_text_config(), *model.modules())
        for name, length in _reached(holder, max_length).items()
        if length > PROBE_WINDOW
    ]
    try:
        for holder, name, _ in before:
            setattr(holder, name, PROBE_WINDOW)
        yield
    finally:
        for holder, name, length in before:
            setattr(holder, name, length)


def require_causal(model: PreTrainedModel, *, autocast: torch.dtype | None) -> None:
    """Check that a model runs, and that a token's logits do not depend on later tokens.

    Raises `EngineError`: what a model that is not causal samples is not what a pass over the whole
    sequence scores.
    """
    prompt = probe_prompts(model.config.get_text_config().vocab_size)[-1]
    try:
        with torch.no_grad():
            whole, part = plain_logits(model, prompt), plain_logits(model, prompt[:PROBE_SHARED])
    except Exception as error:  # a model's code raises anything
        reason = " ".join(str(error).split())[:200]
        raise EngineError(
            f"{type(model).__name__} fails on a sequence of {len(prompt)} tokens: "
            f"{type(error).__name__}: {reason}"
        ) from error
    rounded, spread = is_rounded(model, autocast), float(whole.double().std())
    if not agree(whole[:PROBE_SHARED], part, rounded=rounded, spread=spread):
        raise EngineError(
            f"{type(model).__name__} is not causal: a token's probability depends on later tokens, so "
            "what it samples cannot be scored; use a decoder-only language model"
        )


def backbone_of(model: PreTrainedModel) -> nn.Module:
    """Return the part of a model that computes hidden states. Raises `EngineError` if none is known."""
    # Some architectures name a prefix that belongs to a larger model.
    for name in (model.base_model_prefix, "model"):
        backbone = getattr(model, name, None) if name else None
        if isinstance(backbone, nn.Module):
            return backbone
    raise EngineError(f"{type(model).__name__} has no backbone that computes hidden states")
