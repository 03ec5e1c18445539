"""Attend along the paths of a tree without padding, with a GPU's kernel for variable lengths.

PyTorch's `varlen_attn` takes queries and keys of all sequences end to end. A path's queries are only
the nodes that it adds to the tree, which are its last ones: the kernel's causal mask is aligned at the
ends. So a shared prefix is computed once in attention too, and the queries need no copy.
"""

from __future__ import annotations

import inspect
import logging
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from selfteach.types import TokenTree

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # before torch 2.10, or a build without it
    varlen_attn = None

DTYPES = (torch.bfloat16, torch.float16)
"""What the kernel computes in."""

_log = logging.getLogger(__name__)


def options_of(kernel: Any) -> dict[str, Any] | None:
    """Return the settings with which a version of PyTorch's function attends as models do.

    None if it cannot: torch 2.10 has neither a scale nor a mask that is aligned at the ends. The kernel
    lets several query heads share a key head; torch 2.12 and newer want that said, 2.11 has no word for
    it (`enable_gqa`).
    """
    accepted = inspect.signature(kernel).parameters if kernel is not None else {}
    if not {"scale", "window_size"} <= accepted.keys():
        return None
    return {"window_size": (-1, 0), **({"enable_gqa": True} if "enable_gqa" in accepted else {})}


OPTIONS = options_of(varlen_attn)
"""Settings of the kernel, of this version of PyTorch; None: it has no kernel that will do."""


def is_available(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether the device has the kernel, for matmuls of this dtype."""
    return OPTIONS is not None and device.type == "cuda" and dtype in DTYPES


def failure(model: PreTrainedModel, tree: TokenTree, dtype: torch.dtype) -> str | None:
    """Return in one line why the kernel does not attend along a tree and back; None if it does.

    It has the sizes of a model's heads, and no model is run: a pass of shards that fails in the middle
    would leave them gathered, and other ranks waiting.
    """
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    device = tree.ids_1U.device
    inputs = [
        torch.full((tree.ids_1U.numel(), count, size), 0.1, dtype=dtype, device=device)
        for count in (heads, groups, groups)
    ]
    try:
        with torch.enable_grad():
            query, key, value = (x.requires_grad_() for x in inputs)
            states = attend(query, key, value, tree, scale=None)
        torch.autograd.grad(states.float().sum(), inputs)
    except Exception as error:  # a kernel that this device, or deterministic mode, does not have
        return described(error)
    return None


def described(error: Exception) -> str:
    """Return an error as a part of one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def report_padded(model: PreTrainedModel, reason: str) -> None:
    """Log in one line why sequences are padded though the device has attention without padding."""
    _log.warning(
        "sequences of %s are padded: attention for variable lengths (torch %s) is not used: %s",
        type(model).__name__, torch.__version__, reason,
    )  # fmt: skip


def attend(
    query_UHS: Tensor,
    key_UGS: Tensor,
    value_UGS: Tensor,
    tree: TokenTree,
    *,
    scale: float | None,
) -> Tensor:
    """Compute attention [U, H, S] of U nodes with H query heads and G key heads, along their tree."""
    assert varlen_attn is not None and OPTIONS is not None
    dtype = query_UHS.dtype
    if torch.is_autocast_enabled(query_UHS.device.type):  # which does not know the kernel
        dtype = torch.get_autocast_dtype(query_UHS.device.type)
    keys, values = (_along(tree, x.to(dtype)) for x in (key_UGS, value_UGS))
    states = varlen_attn(
        query_UHS.to(dtype), keys, values, tree.query_starts, tree.key_starts, *tree.longest,
        scale=scale, **OPTIONS,
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
