"""Tokens that all rows of a batch begin with are run once, and their keys and values repeated.

Few-shot examples, system prompts and the answers of one group make most of a prompt the same for
every row. Under causal attention its states do not depend on what follows, so running it once per
batch is exact, gradients included.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence

from torch import Tensor, nn
from transformers import DynamicCache

MIN_SHARED = 32
"""Shorter common prefixes are run row by row: a pass of their own would cost more than it saves."""


def shared_length(prompts: Sequence[Sequence[int]]) -> int:
    """How many leading tokens all prompts share and may be run once; 0 where that does not pay.

    The last token of each prompt is never among them: its state predicts the answer's first.
    """
    if len(prompts) < 2:
        return 0
    longest = min(map(len, prompts)) - 1
    columns = zip(*(prompt[:longest] for prompt in prompts), strict=True)
    common = next((i for i, tokens in enumerate(columns) if len(set(tokens)) > 1), longest)
    return common if common >= MIN_SHARED else 0


def fill(model: nn.Module, ids_P: Tensor, rows: int) -> DynamicCache:
    """The keys and values of one prefix, repeated for ``rows`` rows; differentiable in grad mode."""
    cache = DynamicCache()
    model(input_ids=ids_P[None], use_cache=True, **{cache_argument(model): cache})
    cache.batch_repeat_interleave(rows)
    return cache


def cache_argument(model: nn.Module) -> str:
    """What a transformers model calls its cache: the name changes in 5.2x, and the old one warns."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
