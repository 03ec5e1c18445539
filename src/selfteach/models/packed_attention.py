"""Attend along the paths of a tree without padding, with a GPU's kernel for variable lengths.

PyTorch's `varlen_attn` takes queries and keys of all sequences end to end. A path's queries are only
the nodes that it adds to the tree, which are its last ones: the kernel's causal mask is aligned at the
ends. So a shared prefix is computed once in attention too, and the queries need no copy.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from selfteach.types import TokenTree

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # before torch 2.10, or a build without it
    varlen_attn = None

DTYPES = (torch.bfloat16, torch.float16)
"""What the kernel computes in."""


def is_available(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether the device has the kernel, for matmuls of this dtype."""
    return varlen_attn is not None and device.type == "cuda" and dtype in DTYPES


def attend(
    query_UHS: Tensor,
    key_UGS: Tensor,
    value_UGS: Tensor,
    tree: TokenTree,
    *,
    scale: float | None,
) -> Tensor:
    """Compute attention [U, H, S] of U nodes with H query heads and G key heads, along their tree."""
    assert varlen_attn is not None
    dtype = query_UHS.dtype
    if torch.is_autocast_enabled(query_UHS.device.type):  # which does not know the kernel
        dtype = torch.get_autocast_dtype(query_UHS.device.type)
    keys, values = (_along(tree, x.to(dtype)) for x in (key_UGS, value_UGS))
    states = varlen_attn(
        query_UHS.to(dtype), keys, values, tree.query_starts, tree.key_starts, *tree.longest,
        scale=scale, window_size=(-1, 0), enable_gqa=True,
    )  # fmt: skip
    assert isinstance(states, Tensor)
    return states


def _along(tree: TokenTree, states_UGS: Tensor) -> Tensor:
    """Gather nodes' states along all paths, [K, G, S]; nodes that nothing shares stay where they are.

    Uses the embedding operator, whose gradient is summed in a fixed order on a GPU too.
    """
    if len(tree.keys_K) == len(states_UGS):  # then each node is in one path
        return states_UGS
    return F.embedding(tree.keys_K, states_UGS.flatten(1)).unflatten(1, states_UGS.shape[1:])
