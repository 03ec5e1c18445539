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


def cache_argument(model: nn.Module) -> str:
    """Return the name of a model's cache argument: transformers 5.2x renames it; the old name warns."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
