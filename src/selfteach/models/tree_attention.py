"""Compute prefixes that sequences of a micro-batch share only once (tree attention).

Rollouts of one problem share its prompt and often their first tokens. Under causal attention a token's
state depends only on the tokens before it in its sequence. So sequences are paths of a tree with one
node per distinct prefix: everything but attention is computed once per node, and attention runs along
each path as it would along the sequence. Exact, gradients included.

Paths are padded to the longest one, or, where the device has a kernel for it, laid end to end
(`packed_attention`): then no padding is computed at all.
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

from selfteach.models import packed_attention
from selfteach.models.plain_pass import backbone_of
from selfteach.types import TokenTree

ATTENTION = "sdpa_along_paths"
"""Name under which transformers selects this attention: SDPA, along a tree's paths if there is one."""
MIN_SAVING = 0.9
"""Largest ratio of nodes to padded tokens at which a tree is used: gathering states costs time, too."""


def build_token_tree(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    shared: int,
    least_saving: float | None = None,
) -> TokenTree | None:
    """Build the tree of the sequences after their first ``shared`` tokens; None if it saves too little.

    A tree of more than ``least_saving`` (None: `MIN_SAVING`) times the padded tokens is not built.

    ``prompts`` and ``completions`` are B lists of ids; the result has U nodes and the N nodes that
    predict the completions' tokens, in order. The last token of a completion is left out: nothing
    reads its state.
    """
    read = [(*p[shared:], *c[:-1]) for p, c in zip(prompts, completions, strict=True)]
    length = max(map(len, read))
    path_BL = np.zeros((len(read), length), dtype=np.int64)
    ids, positions, first = list[int](), list[int](), list[int]()
    previous, previous_row, added = (), 0, list[tuple[int, int]]()
    for row in sorted(range(len(read)), key=read.__getitem__):  # shared prefixes become adjacent
        sequence, path_L = read[row], path_BL[row]
        start, end, nodes = _common_prefix(previous, sequence), len(sequence), len(ids)
        path_L[:start] = path_BL[previous_row, :start]
        path_L[start:end] = range(nodes, nodes + end - start)
        ids += sequence[start:]
        positions += range(shared + start, shared + end)
        first += range(row * length + start, row * length + end)
        previous, previous_row = sequence, row
        added.append((row, end - start))
    if len(ids) > (MIN_SAVING if least_saving is None else least_saving) * path_BL.size:
        return None
    predicting = [
        path_L[len(sequence) - len(completion) : len(sequence)]
        for path_L, sequence, completion in zip(path_BL, read, completions, strict=True)
    ]
    adding = [(path_BL[row, : len(read[row])], count) for row, count in added if count]
    queries, keys = [count for _, count in adding], [len(path) for path, _ in adding]
    query_starts, key_starts = (
        torch.from_numpy(np.cumsum([0, *counts], dtype=np.int32)) for counts in (queries, keys)
    )
    return TokenTree(
        torch.tensor([ids]), torch.tensor([positions]), torch.from_numpy(path_BL),
        torch.tensor(first), torch.from_numpy(np.concatenate(predicting)),
        torch.from_numpy(np.concatenate([path for path, _ in adding])),
        query_starts, key_starts, (max(queries), max(keys)),
    )  # fmt: skip


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Return how many leading tokens are the same."""
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


class Paths(NamedTuple):
    """Holds what attention needs for a pass over the nodes of a tree."""

    path_BL: Tensor | None
    """The nodes of each sequence's tokens; any node after its end. None: the pass is over sequences."""
    first_U: Tensor | None
    """Each node's first position in the flattened paths."""
    mask: Tensor | None
    """Additive mask after a shared prefix: [1, 1, L, shared + L]; None without one."""
    packed: TokenTree | None = None
    """The tree, for a kernel that pads nothing (`packed_attention`)."""


def model_inputs(
    tree: TokenTree, shared: int, dtype: torch.dtype, *, packed: bool = False
) -> dict[str, Any]:
    """Return a model's keyword arguments for a tree, besides ids and a shared prefix's cache.

    With ``packed`` attention pads nothing: it needs `packed_attention` and no shared prefix.
    """
    length, device = tree.path_BL.shape[1], tree.path_BL.device
    mask = None
    if shared:
        mask = torch.full((1, 1, length, shared + length), -torch.inf, dtype=dtype, device=device)
        mask.triu_(shared + 1)
    return {
        "position_ids": tree.positions_1U,
        # Given a four-dimensional mask, transformers builds none for U consecutive tokens.
        "attention_mask": torch.zeros((1, 1, 1, 1), dtype=dtype, device=device),
        "paths": Paths(tree.path_BL, tree.first_U, mask, tree if packed else None),
    }


def causal_inputs(ids_BT: Tensor, dtype: torch.dtype) -> dict[str, Any]:
    """Return a model's keyword arguments for a plain causal pass, besides the ids.

    They only keep transformers from reading positions back from a GPU to look for packed sequences.
    """
    mask = torch.zeros((1, 1, 1, 1), dtype=dtype, device=ids_BT.device)
    return {"attention_mask": mask, "paths": Paths(None, None, None)}


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    *, paths: Paths | None = None, **settings: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Compute attention [1, U, heads, S] of nodes, along the paths through them.

    Every path computes the states of its prefix again, equal to those of other paths: each node takes
    its state from the first path through it.
    """
    if paths is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
    if paths.packed is not None and not settings.get("dropout"):
        query_UHS, key_UGS, value_UGS = (x[0].transpose(0, 1) for x in (query, key, value))
        scale = settings.get("scaling")
        states_UHS = packed_attention.attend(
            query_UHS, key_UGS, value_UGS, paths.packed, scale=scale
        )
        return states_UHS[None], None
    if paths.path_BL is None or paths.first_U is None:
        return sdpa_attention_forward(module, query, key, value, None, **settings)
    shared = key.shape[2] - query.shape[2]
    queries, keys, values = (
        _gather_paths(paths.path_BL, x[0, :, -query.shape[2] :]) for x in (query, key, value)
    )
    if shared:
        common = (x[:, :, :shared].expand(len(keys), -1, -1, -1) for x in (key, value))
        keys, values = (torch.cat(x, 2) for x in zip(common, (keys, values), strict=True))
    states_BLHS, _ = sdpa_attention_forward(module, queries, keys, values, paths.mask, **settings)
    states_UD = F.embedding(paths.first_U, states_BLHS.flatten(2).flatten(0, 1))
    return states_UD.view(1, len(states_UD), *states_BLHS.shape[2:]), None


def _gather_paths(path_BL: Tensor, states_HUS: Tensor) -> Tensor:
    """Gather nodes' states into sequences' states, [B, heads, L, S].

    Uses the embedding operator, whose gradient is summed in a fixed order on a GPU too.
    """
    states_UD = states_HUS.transpose(0, 1).flatten(1)
    return F.embedding(path_BL, states_UD).unflatten(2, (len(states_HUS), -1)).transpose(1, 2)


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def enable_tree_attention(model: PreTrainedModel) -> bool:
    """Switch a model to tree attention; returns False for an unsupported one, which is left unchanged.

    Checks the model's settings, since a sliding window may be wider than any probe, and then that the
    states of a probe equal those of a plain pass.
    """
    backbone = backbone_of(model)
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    windowed = getattr(config, "sliding_window", None) or kinds != {"full_attention"}
    parameters = inspect.signature(backbone.forward).parameters.values()
    takes_positions = {"attention_mask", "position_ids"} <= {p.name for p in parameters}
    forwards_kwargs = any(p.kind is p.VAR_KEYWORD for p in parameters)
    before = config._attn_implementation
    if windowed or not (takes_positions and forwards_kwargs) or before not in ("sdpa", ATTENTION):
        return False
    model.set_attn_implementation(ATTENTION)
    if not _matches_plain_pass(model, backbone):
        model.set_attn_implementation(before)
        return False
    return True


@torch.no_grad()
def _matches_plain_pass(model: PreTrainedModel, backbone: nn.Module) -> bool:
    device = next(backbone.parameters()).device
    tree = build_token_tree([(1, 2), (1, 2)], [(0, 3, 1), (3, 0, 1)], 0)
    assert tree is not None
    tree = tree.to(device)
    extra = model_inputs(tree, 0, model.dtype)
    tree_UH = backbone(input_ids=tree.ids_1U, use_cache=False, **extra)[0][0]
    ids_BT = torch.tensor([[1, 2, 0, 3], [1, 2, 3, 0]], device=device)
    plain_NH = backbone(input_ids=ids_BT, use_cache=False)[0][:, 1:].flatten(0, 1)
    error = (tree_UH[tree.columns_N] - plain_NH).abs().max()
    tolerance = 1e-4 if plain_NH.dtype in (torch.float32, torch.float64) else 0.1
    return bool(error <= tolerance * plain_NH.abs().max())
