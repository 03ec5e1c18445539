"""Sequences that begin alike are laid out as one row with branches: no beginning is run twice.

Answers to one question share its prompt and often their first words. Under causal attention a token's
state depends only on what stands before it in its own sequence. So each distinct beginning gets one
place, at its own position, and sees the tokens before it alone: exact, gradients included.
"""

from __future__ import annotations

import heapq
import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from selfteach.types import Branches

KEYS_PER_TOKEN = 1000
"""How many keys a token looks at for as much time as all else in a layer takes: about eight times the
hidden width, here for a small model. Long rows save tokens and pay for them in attention."""
PAYS = 0.9
"""Branches are used where they take at most this share of the plain rows' time: masks cost, too."""

MASK_ENTRIES = 2**26
"""Entries of the largest mask: beyond it, attention without a mask is worth more than fewer tokens."""
TREES_PER_ROW = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
"""How many trees a row holds on average, in the layouts that are compared."""

Path = list[int]
"""The columns of one sequence's tokens."""


def branches(
    prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], shared: int, pad_id: int
) -> Branches | None:
    """The sequences behind their first ``shared`` tokens as rows with branches; None if none pays.

    ``prompts`` and ``answers`` are B lists of ids; the result has R rows of W places and N places that
    predict, one for each of the answers' tokens in order. An answer's last token is left out: its state
    predicts nothing that is read.
    """
    read = [(*p[shared:], *a[:-1]) for p, a in zip(prompts, answers, strict=True)]
    paths, trees, widths = _grow(read)
    rows, starts, width = _shelve(widths)
    pays = rows * _price(width) <= PAYS * len(read) * _price(max(map(len, read)))
    if not pays or rows * width * (shared + width) > MASK_ENTRIES:
        return None
    ids_RW = np.full((rows, width), pad_id)
    positions_RW = np.full((rows, width), shared)
    sees_RWK = np.zeros((rows, width, shared + width), dtype=bool)
    sees_RWK[:, :, :shared] = True
    # Padding sees itself: a token that sees none has no state.
    sees_RWK[:, range(width), range(shared, shared + width)] = True
    before_TT = np.tri(max(map(len, paths)), dtype=bool)
    columns = list[np.ndarray]()
    for tokens, path, tree, answer in zip(read, paths, trees, answers, strict=True):
        row, start = starts[tree]
        path_T = np.array(path) + start
        ids_RW[row, path_T] = tokens
        positions_RW[row, path_T] = range(shared, shared + len(path))
        sees_RWK[row, path_T[:, None], shared + path_T] = before_TT[: len(path), : len(path)]
        columns.append(path_T[-len(answer) :])
    rows_N = np.repeat([starts[tree][0] for tree in trees], [*map(len, answers)])
    told = (ids_RW, positions_RW, sees_RWK, rows_N, np.concatenate(columns))
    return Branches(*map(torch.from_numpy, told))


def _grow(read: Sequence[tuple[int, ...]]) -> tuple[list[Path], list[int], list[int]]:
    """Each sequence's path in its tree, which tree that is, and how wide the trees are."""
    paths, trees, widths = [Path()] * len(read), [0] * len(read), list[int]()
    before, path = (), Path()
    for index in sorted(range(len(read)), key=read.__getitem__):  # who begins alike stands together
        tokens = read[index]
        alike = _alike(before, tokens)
        new = len(tokens) - alike
        if not widths or _price(widths[-1] + new) > _price(widths[-1]) + _price(len(tokens)):
            widths.append(0)
            alike, new = 0, len(tokens)
        path = [*path[:alike], *range(widths[-1], widths[-1] + new)]
        widths[-1] += new
        paths[index], trees[index], before = path, len(widths) - 1, tokens
    return paths, trees, widths


def _alike(a: Sequence[int], b: Sequence[int]) -> int:
    """How many leading tokens are the same."""
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


def _shelve(widths: Sequence[int]) -> tuple[int, list[tuple[int, int]], int]:
    """Trees side by side in rows of like width: how many rows, each tree's row and start, the width."""
    best: tuple[float, int, list[tuple[int, int]], int] | None = None
    widest_first = sorted(range(len(widths)), key=lambda tree: -widths[tree])
    for rows in sorted({max(1, len(widths) // share) for share in TREES_PER_ROW}):
        filled, starts = [(0, row) for row in range(rows)], [(0, 0)] * len(widths)
        for tree in widest_first:
            start, row = filled[0]
            starts[tree] = (row, start)
            heapq.heapreplace(filled, (start + widths[tree], row))
        width = max(filled)[0]
        if best is None or rows * _price(width) < best[0]:
            best = (rows * _price(width), rows, starts, width)
    assert best is not None
    return best[1:]


def _price(width: int) -> float:
    """What a row costs, in tokens that see nothing."""
    return width * (1 + width / KEYS_PER_TOKEN)


def inputs(found: Branches, dtype: torch.dtype) -> dict[str, Any]:
    """What a transformers model of a dtype is told of branches besides the ids.

    The mask is what attention adds: given one of booleans, every layer makes its own of it.
    """
    seen, unseen = torch.tensor([0.0, -torch.inf], dtype=dtype, device=found.sees_RWK.device)
    mask = torch.where(found.sees_RWK[:, None], seen, unseen)
    return {"attention_mask": mask, "position_ids": found.positions_RW}


@torch.no_grad()
def understood_by(model: PreTrainedModel) -> bool:
    """Whether a model's states under a mask and positions of ours are those of the plain pass.

    Asked of its settings, since a window may be wider than any probe, and then of the model itself.
    """
    backbone: nn.Module = getattr(model, model.base_model_prefix)
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    windowed = getattr(config, "sliding_window", None) or kinds != {"full_attention"}
    takes = inspect.signature(backbone.forward).parameters.keys()
    known = {"attention_mask", "position_ids"} <= takes
    if windowed or not known or config._attn_implementation not in ("sdpa", "eager"):
        return False
    device = next(backbone.parameters()).device
    found = branches([(1, 2), (1, 2)], [(0, 3, 1), (3, 0, 1)], 0, 0)
    assert found is not None
    found = found.to(device)
    folded = backbone(input_ids=found.ids_RW, use_cache=False, **inputs(found, model.dtype))[0]
    ids_BT = torch.tensor([[1, 2, 0, 3], [1, 2, 3, 0]], device=device)
    plain_NH = backbone(input_ids=ids_BT, use_cache=False)[0][:, 1:].flatten(0, 1)
    error = (folded[found.rows_N, found.columns_N] - plain_NH).abs().max()
    tolerance = 1e-4 if plain_NH.dtype in (torch.float32, torch.float64) else 0.1
    return bool(error <= tolerance * plain_NH.abs().max())
