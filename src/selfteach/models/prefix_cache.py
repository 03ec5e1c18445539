"""Compute the prefix that all rows of a batch share once, and repeat its keys and values.

Few-shot examples, system prompts and the rollouts of one group make most of a prompt the same for
every row. Under causal attention its states do not depend on what follows, so computing it once per
batch is exact, gradients included.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence

from torch import Tensor, nn
from transformers import DynamicCache

States = tuple[tuple[Tensor, Tensor], ...]
"""Keys and values [heads, T, size] of a sequence's T tokens, for each layer."""
MIN_SHARED = 32
"""Shorter prefixes are computed row by row: a separate pass would cost more than it saves."""


def shared_length(prompts: Sequence[Sequence[int]], least: int | None = None) -> int:
    """Return how many leading tokens all prompts share and can be computed once.

    0 if there are fewer than ``least`` (None: `MIN_SHARED`). The last token of each prompt is never
    among them: its state predicts the rollout's first token.
    """
    if len(prompts) < 2:
        return 0
    longest = min(map(len, prompts)) - 1
    columns = zip(*(prompt[:longest] for prompt in prompts), strict=True)
    common = next((i for i, tokens in enumerate(columns) if len(set(tokens)) > 1), longest)
    return common if common >= (MIN_SHARED if least is None else least) else 0


def fill(model: nn.Module, ids_P: Tensor, rows: int) -> DynamicCache:
    """Compute one prefix's keys and values, repeated for ``rows`` rows; differentiable in grad mode."""
    cache = DynamicCache()
    model(input_ids=ids_P[None], use_cache=True, **{cache_argument(model): cache})
    cache.batch_repeat_interleave(rows)
    return cache


def restore(states_Q: Sequence[States], shared: int) -> DynamicCache:
    """Return the cache of sequences whose keys and values are given, a row each.

    The first ``shared`` tokens of a sequence are at the front of its row, and the others at its end:
    ``[shared | padding | stored]``.
    """
    cache = DynamicCache()
    for at, layer_Q in enumerate(zip(*states_Q, strict=True)):
        keys_Q, values_Q = zip(*layer_Q, strict=True)
        cache.update(_rows(keys_Q, shared), _rows(values_Q, shared), at)
    return cache


def length(states: States) -> int:
    """Return the number of tokens whose keys and values these are."""
    return states[0][0].shape[1]


def _rows(states_Q: Sequence[Tensor], shared: int) -> Tensor:
    """Return states [heads, T_q, size] as rows [Q, heads, T, size], padded after ``shared`` tokens."""
    heads, _, size = states_Q[0].shape
    width = max(states.shape[1] for states in states_Q)
    rows = states_Q[0].new_zeros((len(states_Q), heads, width, size))
    for row, states in zip(rows, states_Q, strict=True):
        row[:, :shared] = states[:, :shared]
        row[:, width - (states.shape[1] - shared) :] = states[:, shared:]
    return rows


def cache_argument(model: nn.Module) -> str:
    """Return the name of a model's cache argument: transformers 5.2x renames it; the old name warns."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
