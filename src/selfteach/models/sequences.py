"""Build right-padded id tensors of prompts and rollouts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain

import torch
from torch import Tensor

from selfteach.models.prefix_cache import shared_length
from selfteach.models.tree_attention import build_token_tree
from selfteach.types import Sequences


@dataclass(frozen=True, slots=True)
class SequenceLayout:
    """Says which passes a policy runs over a batch (`Policy.layout`), for which it is laid out."""

    prefix: bool = True
    """What all sequences begin with has a pass of its own; else it is part of their tree."""
    packed: bool = False
    """Trees are run without padding: sequences are a tree in any case, of whole sequences."""


PADDED = SequenceLayout()
"""For a policy that pads, with a pass for a shared prefix."""


def sequences(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    pad_id: int,
    least_shared: int | None = None,
    *,
    layout: SequenceLayout = PADDED,
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
    has_prefix = layout.prefix and not layout.packed
    shared = shared_length(prompts, least_shared) if has_prefix else 0
    return Sequences(
        ids_BT=torch.tensor([[*ids, *[pad_id] * (width - len(ids))] for ids in whole]),
        rows_N=torch.arange(len(whole)).repeat_interleave(torch.tensor(lengths)),
        columns_N=torch.tensor(list(chain.from_iterable(predicted)), dtype=torch.long),
        shared=shared,
        tree=build_token_tree(prompts, completions, shared, 1.0 if layout.packed else None),
    )


def select_tokens(
    side: Sequences, completions: Sequence[int], at: Sequence[Sequence[int]]
) -> Sequences:
    """Return sequences of which only some tokens are predicted, such as those that a model sampled.

    ``completions`` are the rows' numbers of completion tokens, all of which ``side`` predicts, and
    ``at`` the indices of those that stay. The others have no state that is read: no logits.
    """
    keep_N = kept_tokens(completions, at)
    if keep_N is None:
        return side
    tree = side.tree
    if tree is not None:
        tree = replace(tree, columns_N=tree.columns_N[keep_N])
    return replace(side, rows_N=side.rows_N[keep_N], columns_N=side.columns_N[keep_N], tree=tree)


def kept_tokens(completions: Sequence[int], at: Sequence[Sequence[int]]) -> Tensor | None:
    """Return the indices of chosen tokens among those of all rows; None if all are chosen."""
    if all(len(row) == length for row, length in zip(at, completions, strict=True)):
        return None
    starts = accumulate(completions, initial=0)
    return torch.tensor([start + i for start, row in zip(starts, at, strict=False) for i in row])
