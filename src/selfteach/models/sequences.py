"""Build right-padded id tensors of prompts and rollouts."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch

from selfteach.models.prefix_cache import shared_length
from selfteach.models.tree_attention import build_token_tree
from selfteach.types import Sequences


def sequences(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    pad_id: int,
    least_shared: int | None = None,
) -> Sequences:
    """Append completions to prompts, right-padded; includes the positions that predict their tokens.

    ``least_shared`` as in `shared_length`.
    """
    whole = [
        (*prompt, *completion) for prompt, completion in zip(prompts, completions, strict=True)
    ]
    width = max(map(len, whole))
    lengths = [len(completion) for completion in completions]
    # A tensor per row would cost more than the rows themselves.
    predicted = (range(len(p) - 1, len(ids) - 1) for p, ids in zip(prompts, whole, strict=True))
    shared = shared_length(prompts, least_shared)
    return Sequences(
        ids_BT=torch.tensor([[*ids, *[pad_id] * (width - len(ids))] for ids in whole]),
        rows_N=torch.arange(len(whole)).repeat_interleave(torch.tensor(lengths)),
        columns_N=torch.tensor(list(chain.from_iterable(predicted)), dtype=torch.long),
        shared=shared,
        tree=build_token_tree(prompts, completions, shared),
    )
