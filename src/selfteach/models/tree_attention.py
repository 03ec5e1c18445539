"""Sequences that begin alike are the paths of a tree: no beginning is run twice.

Answers to one question share its prompt and often their first words. Under causal attention a token's
state depends only on what stands before it in its own sequence. So each distinct beginning has one
place, at its own position, where all but attention is computed once; attention looks along each path
as it would along the sequence. Exact, gradients included.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from selfteach.types import TokenTree

ATTENTION = "sdpa_along_paths"
"""Our attention's name in a model's settings: PyTorch's, along paths where a pass has some."""
MIN_SAVING = 0.9
"""Places are used where they are at most this share of the padded rows: gathering costs, too."""


def branches(
    prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], shared: int
) -> TokenTree | None:
    """The sequences behind their first ``shared`` tokens as paths of a tree; None if that does not pay.

    ``prompts`` and ``answers`` are B lists of ids; the result has U places and N of them that predict,
    one for each of the answers' tokens in order. An answer's last token is left out: its state predicts
    nothing that is read.
    """
    read = [(*p[shared:], *a[:-1]) for p, a in zip(prompts, answers, strict=True)]
    length = max(map(len, read))
    path_BL = np.zeros((len(read), length), dtype=np.int64)
    ids, positions, first = list[int](), list[int](), list[int]()
    before, last = (), 0
    for row in sorted(range(len(read)), key=read.__getitem__):  # who begins alike stands together
        own, path_L = read[row], path_BL[row]
        alike, end, places = _alike(before, own), len(own), len(ids)
        path_L[:alike] = path_BL[last, :alike]
        path_L[alike:end] = range(places, places + end - alike)
        ids += own[alike:]
        positions += range(shared + alike, shared + end)
        first += range(row * length + alike, row * length + end)
        before, last = own, row
    if len(ids) > MIN_SAVING * path_BL.size:
        return None
    predicting = [
        path_L[len(own) - len(answer) : len(own)]
        for path_L, own, answer in zip(path_BL, read, answers, strict=True)
    ]
    return TokenTree(
        torch.tensor([ids]), torch.tensor([positions]), torch.from_numpy(path_BL),
        torch.tensor(first), torch.from_numpy(np.concatenate(predicting)),
    )  # fmt: skip


def _alike(a: Sequence[int], b: Sequence[int]) -> int:
    """How many leading tokens are the same."""
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


class Paths(NamedTuple):
    """What attention is told of a pass over the places of a tree."""

    path_BL: Tensor
    """The places of each sequence's tokens, any place behind its end."""
    first_U: Tensor
    """Where in the flattened paths each place stands first."""
    mask: Tensor | None
    """What is added behind a common beginning: [1, 1, L, shared + L]; None without one."""


def inputs(found: TokenTree, shared: int, dtype: torch.dtype) -> dict[str, Any]:
    """What a model that `enable_tree_attention` is told besides ids and a common beginning's cache."""
    length, device = found.path_BL.shape[1], found.path_BL.device
    mask = None
    if shared:
        mask = torch.full((1, 1, length, shared + length), -torch.inf, dtype=dtype, device=device)
        mask.triu_(shared + 1)
    return {
        "position_ids": found.positions_1U,
        # Given one of four dimensions, transformers makes none for U tokens that follow each other.
        "attention_mask": torch.zeros((1, 1, 1, 1), dtype=dtype, device=device),
        "paths": Paths(found.path_BL, found.first_U, mask),
    }


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    *, paths: Paths | None = None, **settings: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attention [1, U, heads, S] of places, each seen by the paths that run through it.

    Every path computes the states of its beginning again, which are the same as another's: they are
    taken from where each place stands first.
    """
    if paths is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
    shared = key.shape[2] - query.shape[2]
    queries, keys, values = (
        _along(paths.path_BL, x[0, :, -query.shape[2] :]) for x in (query, key, value)
    )
    if shared:
        common = (x[:, :, :shared].expand(len(keys), -1, -1, -1) for x in (key, value))
        keys, values = (torch.cat(x, 2) for x in zip(common, (keys, values), strict=True))
    told_BLHS, _ = sdpa_attention_forward(module, queries, keys, values, paths.mask, **settings)
    told_UD = F.embedding(paths.first_U, told_BLHS.flatten(2).flatten(0, 1))
    return told_UD.view(1, len(told_UD), *told_BLHS.shape[2:]), None


def _along(path_BL: Tensor, states_HUS: Tensor) -> Tensor:
    """States of places as states of sequences, [B, heads, L, S].

    By the operator for embeddings, whose gradient is summed in one order on a GPU too.
    """
    states_UD = states_HUS.transpose(0, 1).flatten(1)
    return F.embedding(path_BL, states_UD).unflatten(2, (len(states_HUS), -1)).transpose(1, 2)


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def enable_tree_attention(model: PreTrainedModel) -> bool:
    """Have a model look along paths where a pass has some; False for one that cannot, left as it was.

    Asked of its settings, since a window may be wider than any probe, and then of the model itself: its
    states must be those of the plain pass.
    """
    backbone: nn.Module = getattr(model, model.base_model_prefix)
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    windowed = getattr(config, "sliding_window", None) or kinds != {"full_attention"}
    takes = inspect.signature(backbone.forward).parameters.values()
    known = {"attention_mask", "position_ids"} <= {p.name for p in takes}
    hands_on = any(p.kind is p.VAR_KEYWORD for p in takes)
    before = config._attn_implementation
    if windowed or not (known and hands_on) or before not in ("sdpa", ATTENTION):
        return False
    model.set_attn_implementation(ATTENTION)
    if not _probed(model, backbone):
        model.set_attn_implementation(before)
        return False
    return True


@torch.no_grad()
def _probed(model: PreTrainedModel, backbone: nn.Module) -> bool:
    device = next(backbone.parameters()).device
    found = branches([(1, 2), (1, 2)], [(0, 3, 1), (3, 0, 1)], 0)
    assert found is not None
    found = found.to(device)
    told = inputs(found, 0, model.dtype)
    folded_UH = backbone(input_ids=found.ids_1U, use_cache=False, **told)[0][0]
    ids_BT = torch.tensor([[1, 2, 0, 3], [1, 2, 3, 0]], device=device)
    plain_NH = backbone(input_ids=ids_BT, use_cache=False)[0][:, 1:].flatten(0, 1)
    error = (folded_UH[found.columns_N] - plain_NH).abs().max()
    tolerance = 1e-4 if plain_NH.dtype in (torch.float32, torch.float64) else 0.1
    return bool(error <= tolerance * plain_NH.abs().max())
