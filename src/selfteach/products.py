"""Products of rows with a weight: exact where a device can, and by whichever library is faster.

A GPU multiplies halves into float32 sums; rounded to half again, logits near a teacher's would lose
what tells the two apart (an eighth of the gradient's norm where they differ by a tenth).

PyTorch takes a float32 product to BLAS. With a weight that no cache holds oneDNN needs a tenth less
time for many rows and half for a few; with a small one its calls cost more than they save. It is asked
by the names that PyTorch's own compiler uses, since there are no public ones.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

HALVES = (torch.float16, torch.bfloat16)
WIDE = 2**22
"""Entries of a weight that no cache holds."""
ROWS_ADDED = 4096
"""Rows of a product that are computed at a time where they are then added in another dtype."""


def linear(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``rows Wᵀ + b`` of [*, I] with [O, I].

    In grad mode it is `torch.nn.functional.linear`, and differentiable. Outside of it a GPU's product
    of halves comes in float32, unrounded.
    """
    if rows.is_cuda and rows.dtype in HALVES and rows.numel() and not torch.is_grad_enabled():
        flat = torch.mm(rows.reshape(-1, rows.shape[-1]), weight.T, out_dtype=torch.float32)
        return (flat if bias is None else flat + bias).reshape(*rows.shape[:-1], len(weight))
    if weight.numel() < WIDE or torch.is_grad_enabled() or not _faster(rows, weight):
        return F.linear(rows, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")


def write(into: Tensor, a: Tensor, b: Tensor) -> None:
    """``a b`` into a tensor, of a wider dtype too where that is a GPU's."""
    if a.dtype == into.dtype:
        torch.mm(a, b, out=into)
    else:
        torch.mm(a, b, out_dtype=into.dtype, out=into)


def add(into: Tensor, a: Tensor, b: Tensor) -> None:
    """Add ``a b`` to a tensor in its own dtype, on a processor without a product of its size."""
    if a.dtype == into.dtype:
        into.addmm_(a, b)
    elif into.is_cuda:  # which multiplies in half precision and adds in float32 in one go
        torch.addmm(into, a, b, out_dtype=into.dtype, out=into)
    else:
        for start in range(0, len(into), ROWS_ADDED):
            rows = slice(start, start + ROWS_ADDED)
            into[rows] += a[rows] @ b


def packed(weight: Tensor, bias: Tensor | None, rows: int) -> Callable[[Tensor], Tensor]:
    """``x -> x Wᵀ + b`` with a copy of W in oneDNN's own order, best for about so many rows.

    Not differentiable. For weights that `packs` says yes to.
    """
    own = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, own, bias, "none", [], "")


def packs(weight: Tensor) -> bool:
    """True for what oneDNN is asked about: float32 on a processor."""
    is_plain = type(weight) in (Tensor, nn.Parameter) and weight.dtype == torch.float32
    return weight.device.type == "cpu" and is_plain and torch.backends.mkldnn.is_available()


def _faster(rows: Tensor, weight: Tensor) -> bool:
    autocast = torch.is_autocast_enabled("cpu")
    return packs(weight) and rows.dtype == torch.float32 and len(rows) > 0 and not autocast
