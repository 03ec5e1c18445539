"""Products of rows with a weight: exact where a device can, and by whichever library is faster.

A GPU multiplies halves into float32 sums; rounded to half again, logits near a teacher's would lose
what tells the two apart (an eighth of the gradient's norm where they differ by a tenth). A processor
without instructions for halves is asked in float32, for a few rows of a weight at a time: it is many
times as fast, and as exact.

PyTorch takes a float32 product to BLAS. With a weight that no cache holds oneDNN needs a tenth less
time for many rows and half for a few; with a small one its calls cost more than they save. It is asked
by the names that PyTorch's own compiler uses, since there are no public ones.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

HALVES = (torch.float16, torch.bfloat16)
WIDE = 2**22
"""Entries of a weight that no cache holds."""
ROWS_ADDED = 4096
"""Rows of a product that are computed at a time where they are then added in another dtype."""
PART_ENTRIES = 2**19
"""Entries of a weight that are cast to float32 at a time: 2 MiB, which a cache holds."""


@functools.cache
def multiplies_halves(device: str) -> bool:
    """True where a kind of device (``cpu``, ``cuda``) has instructions for products of bfloat16.

    A processor without them (AVX-512 BF16 or AMX on x86) takes 5 to 150 times as long as in float32. A
    GPU that is not here is taken to have them.
    """
    if device == "cuda":
        here = torch.cuda.is_available()
        return not here or torch.cuda.is_bf16_supported(including_emulation=False)
    mkldnn = torch.backends.mkldnn.is_available()
    return device == "cpu" and mkldnn and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def linear(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``rows Wᵀ + b`` of [*, I] with [O, I].

    In grad mode it is `torch.nn.functional.linear`, and differentiable. Outside of it a product of
    halves comes in float32, unrounded, from all but processors that have instructions for them.
    """
    if rows.is_cuda and rows.dtype in HALVES and rows.numel() and not torch.is_grad_enabled():
        flat = torch.mm(rows.reshape(-1, rows.shape[-1]), weight.T, out_dtype=torch.float32)
        return (flat if bias is None else flat + bias).reshape(*rows.shape[:-1], len(weight))
    if rows.dtype in HALVES and weight.numel() and not torch.is_grad_enabled() and widens(rows):
        if weight.dtype in HALVES:
            return _linear_in_parts(rows, weight, bias)
        return linear(rows.float(), weight, bias)
    if weight.numel() < WIDE or torch.is_grad_enabled() or not _faster(rows, weight):
        return F.linear(rows, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")


def times(rows: Tensor, weight: Tensor) -> Tensor:
    """``rows W`` of [C, V] with [V, H], in the dtype of the rows, which may be wider."""
    if rows.dtype == weight.dtype:
        return rows @ weight
    made = rows.new_zeros(len(rows), weight.shape[1])
    for part in _parts(weight):
        made.addmm_(rows[:, part], weight[part].to(rows.dtype))
    return made


def write(into: Tensor, a: Tensor, b: Tensor) -> None:
    """``a b`` into a tensor, of a wider dtype too on a GPU, of a narrower one on a processor."""
    if a.dtype == into.dtype:
        torch.mm(a, b, out=into)
    elif into.is_cuda:
        torch.mm(a, b, out_dtype=into.dtype, out=into)
    else:
        into.copy_(a @ b.to(a.dtype))


def add(into: Tensor, a: Tensor, b: Tensor) -> None:
    """Add ``a b`` to a tensor in its own dtype, on a processor without a product of its size.

    ``b`` may be narrower than ``a``.
    """
    if a.dtype == into.dtype:
        into.addmm_(a, b.to(a.dtype))
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


def widens(rows: Tensor) -> bool:
    """True for halves that `linear` multiplies in float32 on a processor."""
    return rows.is_cpu and rows.dtype in HALVES and not multiplies_halves("cpu")


def suited(weight: Tensor, rows: Tensor) -> Tensor:
    """A weight in the dtype that products with these rows want it in: theirs, or its own where that is
    wider and `linear` multiplies in it anyway."""
    kept = weight.dtype == torch.float32 and not torch.is_grad_enabled() and widens(rows)
    return weight if kept else weight.to(rows.dtype)


def narrowed(grad: Tensor, rows: Tensor) -> Tensor:
    """A gradient in the dtype that products with these rows are best computed in."""
    return grad if widens(rows) else grad.to(rows.dtype)


def _linear_in_parts(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    wide = rows.reshape(-1, rows.shape[-1]).float()
    made = wide.new_empty(len(wide), len(weight))
    for part in _parts(weight):
        torch.mm(wide, weight[part].float().T, out=made[:, part])
    return (made if bias is None else made.add_(bias)).reshape(*rows.shape[:-1], len(weight))


def _parts(weight: Tensor) -> Iterator[slice]:
    """Its rows, `PART_ENTRIES` at a time."""
    step = max(1, PART_ENTRIES // max(1, weight.shape[1]))
    return (slice(i, min(i + step, len(weight))) for i in range(0, len(weight), step))


def _faster(rows: Tensor, weight: Tensor) -> bool:
    autocast = torch.is_autocast_enabled("cpu")
    return packs(weight) and rows.dtype == torch.float32 and len(rows) > 0 and not autocast
