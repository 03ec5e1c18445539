"""Multiply rows by a weight: exactly where a device can, and with whichever library is faster.

A GPU multiplies bf16/fp16 into float32 sums; rounded to bf16 again, logits close to a teacher's would
lose the difference between the two (an eighth of the gradient's norm where they differ by a tenth). A
CPU without bf16 instructions computes in float32, for a few rows of a weight at a time: it is many
times as fast, and as exact.

PyTorch gives a float32 matmul to BLAS. With a weight that no cache holds oneDNN needs a tenth less time
for many rows and half for a few; with a small one its calls cost more than they save. It is called by
the names that PyTorch's own compiler uses, since there are no public ones.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

HALF_DTYPES = (torch.float16, torch.bfloat16)
WIDE = 2**22
"""Entries of a weight that no cache holds."""
ROWS_ADDED = 4096
"""Rows of a matmul that are computed at a time where they are then added in another dtype."""
BLOCK_ENTRIES = 2**19
"""Entries of a weight that are cast to float32 at a time: 2 MiB, which a cache holds."""


@functools.cache
def has_fast_bf16(device: str) -> bool:
    """Return True where a kind of device (``cpu``, ``cuda``) has instructions for bf16 matmuls.

    A CPU without them (AVX-512 BF16 or AMX on x86) takes 5 to 150 times as long as in float32. A GPU
    that this machine lacks is assumed to have them.
    """
    if device == "cuda":
        here = torch.cuda.is_available()
        return not here or torch.cuda.is_bf16_supported(including_emulation=False)
    mkldnn = torch.backends.mkldnn.is_available()
    return device == "cpu" and mkldnn and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def linear(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute ``rows Wᵀ + b`` of [*, I] with [O, I].

    In grad mode it is `torch.nn.functional.linear`, and differentiable. Outside of it the result for
    bf16/fp16 is float32, unrounded, except on a CPU with bf16 instructions.
    """
    if rows.is_cuda and rows.dtype in HALF_DTYPES and rows.numel() and not torch.is_grad_enabled():
        flat = torch.mm(rows.reshape(-1, rows.shape[-1]), weight.T, out_dtype=torch.float32)
        return (flat if bias is None else flat + bias).reshape(*rows.shape[:-1], len(weight))
    if weight.numel() and not torch.is_grad_enabled() and computes_in_float32(rows):
        if weight.dtype in HALF_DTYPES:
            return _linear_in_blocks(rows, weight, bias)
        return linear(rows.float(), weight, bias)
    if weight.numel() < WIDE or torch.is_grad_enabled() or not _onednn_is_faster(rows, weight):
        return F.linear(rows, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")


def mm(rows: Tensor, weight: Tensor) -> Tensor:
    """Compute ``rows W`` of [C, V] with [V, H], in the dtype of the rows, which may be wider."""
    if rows.dtype == weight.dtype:
        return rows @ weight
    total = rows.new_zeros(len(rows), weight.shape[1])
    for block in _row_blocks(weight):
        total.addmm_(rows[:, block], weight[block].to(rows.dtype))
    return total


def mm_into(into: Tensor, a: Tensor, b: Tensor) -> None:
    """Write ``a b`` into a tensor, which on a GPU may be of a wider dtype."""
    if a.dtype == into.dtype:
        torch.mm(a, b, out=into)
    else:
        torch.mm(a, b, out_dtype=into.dtype, out=into)


def addmm_into(into: Tensor, a: Tensor, b: Tensor) -> None:
    """Add ``a b`` to a tensor in the tensor's dtype, on a CPU without a temporary of its size.

    ``b`` may be narrower than ``a``.
    """
    if a.dtype == into.dtype:
        into.addmm_(a, b.to(a.dtype))
    elif into.is_cuda:  # one call multiplies in bf16/fp16 and adds in float32
        torch.addmm(into, a, b, out_dtype=into.dtype, out=into)
    else:
        for start in range(0, len(into), ROWS_ADDED):
            rows = slice(start, start + ROWS_ADDED)
            into[rows] += a[rows] @ b


def pack(weight: Tensor, bias: Tensor | None, rows: int) -> Callable[[Tensor], Tensor]:
    """Return ``x -> x Wᵀ + b`` with W copied to oneDNN's memory layout for about ``rows`` rows.

    Not differentiable. For weights that `can_pack` accepts.
    """
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


def can_pack(weight: Tensor) -> bool:
    """Return True for a weight that oneDNN is used for: float32 on a CPU."""
    is_plain = type(weight) in (Tensor, nn.Parameter) and weight.dtype == torch.float32
    return weight.device.type == "cpu" and is_plain and torch.backends.mkldnn.is_available()


def computes_in_float32(rows: Tensor) -> bool:
    """Return True for bf16/fp16 rows that `linear` multiplies in float32 on a CPU."""
    return rows.is_cpu and rows.dtype in HALF_DTYPES and not has_fast_bf16("cpu")


def cast_weight(weight: Tensor, rows: Tensor) -> Tensor:
    """Cast a weight to the dtype for matmuls with these rows: the rows' dtype, or float32 where it has
    that already and `linear` computes in it."""
    is_float32 = weight.dtype == torch.float32
    if is_float32 and not torch.is_grad_enabled() and computes_in_float32(rows):
        return weight
    return weight.to(rows.dtype)


def cast_gradient(grad: Tensor, rows: Tensor) -> Tensor:
    """Cast a gradient to the dtype in which matmuls with these rows are best computed."""
    return grad if computes_in_float32(rows) else grad.to(rows.dtype)


def _linear_in_blocks(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    wide = rows.reshape(-1, rows.shape[-1]).float()
    out = wide.new_empty(len(wide), len(weight))
    for block in _row_blocks(weight):
        torch.mm(wide, weight[block].float().T, out=out[:, block])
    return (out if bias is None else out.add_(bias)).reshape(*rows.shape[:-1], len(weight))


def _row_blocks(weight: Tensor) -> Iterator[slice]:
    """Yield slices of the weight's rows, `BLOCK_ENTRIES` at a time."""
    step = max(1, BLOCK_ENTRIES // max(1, weight.shape[1]))
    return (slice(i, min(i + step, len(weight))) for i in range(0, len(weight), step))


def _onednn_is_faster(rows: Tensor, weight: Tensor) -> bool:
    autocast = torch.is_autocast_enabled("cpu")
    return can_pack(weight) and rows.dtype == torch.float32 and len(rows) > 0 and not autocast
