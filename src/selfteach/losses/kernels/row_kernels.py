"""Compute log-probabilities, divergences and their gradients from rows of logits with Triton.

Each kernel reads logits in their dtype and computes in float32, one row to a program. The only new
tensor of the logits' size is the gradient, computed in the backward pass: a call saves a few numbers
per row. `analytic_gradients` has the formulas for any device.

Triton comes with PyTorch's builds for GPUs, and is not imported with others. On a CPU the kernels run
where it is installed and TRITON_INTERPRET=1 was set before this module was imported: slowly, for tests,
in float64 too.
"""

# pyright: reportInvalidTypeForm=false
from __future__ import annotations

import contextlib
import inspect
import math
import os
from collections.abc import Mapping
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

triton: Any = None
tl: Any = None
if torch.version.cuda or torch.version.hip or os.environ.get("TRITON_INTERPRET") == "1":
    with contextlib.suppress(ImportError):
        triton, tl = import_module("triton"), import_module("triton.language")

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
BLOCK = 8192
"""Entries of a row that a program reads at a time, at most."""
KINDS = {"forward_kl": 0, "reverse_kl": 1, "jsd": 2}


def runs(*logits: Tensor) -> bool:
    """Return True where the kernels support these logits [N, V]."""
    if triton is None:
        return False
    return all(x.is_cuda and x.dtype in DTYPES and x.shape[-1] > 0 for x in logits)


def _jit(fn: Any) -> Any:
    """Compile a kernel, unwrapped: Triton reads the source and globals of the function it is given."""
    return fn if triton is None else triton.jit(inspect.unwrap(fn))


@_jit
def _grown(high, total, x, FLOAT: tl.constexpr):
    """Add the entries x to a running log-sum-exp (largest, Σ exp(x - largest)).

    While all entries are -inf, exponents are relative to 0 and the sum stays 0.
    """
    top = tl.maximum(high, tl.max(x, axis=0))
    finite = tl.where(top == -float("inf"), 0.0, top).to(FLOAT)
    total = total * tl.exp(high - finite) + tl.sum(tl.exp(x - finite), axis=0)
    return top, total


@_jit
def _row_sums(
    logits, ids, in_top_k, logp, log_sum, log_tail, V, stride, inverse,
    FLOAT: tl.constexpr, TAIL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute log p(id), the log-sum-exp of x / T, and that of the tail, of one row."""
    row = tl.program_id(0).to(tl.int64)
    high = tl.full((), -float("inf"), FLOAT)
    total = tl.zeros((), FLOAT)
    high_tail = tl.full((), -float("inf"), FLOAT)
    total_tail = tl.zeros((), FLOAT)
    for start in range(0, V, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = (
            tl.load(logits + row * stride + at, mask=at < V, other=-float("inf")).to(FLOAT)
            * inverse
        )
        high, total = _grown(high, total, x, FLOAT)
        if TAIL:
            out = tl.load(in_top_k + row * V + at, mask=at < V, other=1) != 0
            high_tail, total_tail = _grown(
                high_tail, total_tail, tl.where(out, -float("inf"), x), FLOAT
            )
    log_total = high + tl.log(total)
    id_logit = tl.load(logits + row * stride + tl.load(ids + row)).to(FLOAT) * inverse
    tl.store(logp + row, id_logit - log_total)
    tl.store(log_sum + row, log_total)
    if TAIL:
        empty = total_tail == 0
        log_total = high_tail + tl.log(tl.where(empty, 1.0, total_tail).to(FLOAT))
        tl.store(log_tail + row, tl.where(empty, -float("inf"), log_total))


@_jit
def _expm1(x):
    """Compute exp(x) - 1 without losing the digits of a small x (Kahan)."""
    u = tl.exp(x)
    below = u - 1
    scaled = below * x / tl.log(tl.where(below == 0, 2.0, u))
    return tl.where(below == 0, x, tl.where(u == 0, -1.0, scaled))


@_jit
def _log1p(x):
    """Compute log(1 + x) without losing the digits of a small x (Kahan)."""
    u = 1 + x
    below = u - 1
    return tl.where(below == 0, x, tl.log(u) * x / tl.where(below == 0, 1.0, below))


@_jit
def _term_slope_mass(
    s, t, beta, factor, clip, FLOAT: tl.constexpr, KIND: tl.constexpr, CLIP: tl.constexpr
):
    """Compute the term f, g = df / d log s, the mass s and the capped flag from log s and log t.

    A mass of zero has the term 0 whatever the other side is.
    """
    p = tl.exp(s)
    q = tl.exp(t)
    if KIND == 0:  # KL(t ‖ s)
        term = tl.where(q == 0, 0.0, q * (t - s))
        slope = -q
    elif KIND == 1:  # KL(s ‖ t)
        term = tl.where(p == 0, 0.0, p * (s - t))
        slope = term + p if CLIP else term
    else:
        # As `divergence.log_ratios_to_mixture`: d is log(t/s), and the result log(s/m), log(t/m).
        d = tl.minimum(tl.maximum(t - s, -80.0), 80.0)
        from_s = _log1p(beta * _expm1(d))
        from_t = _log1p((1 - beta) * _expm1(-d))
        over_s = tl.where(beta <= 0.5, -from_s, -d - from_t)
        over_t = tl.where(beta <= 0.5, d - from_s, -from_t)
        slope = tl.where(p == 0, 0.0, (1 - beta) * factor * p * over_s)
        term = slope + tl.where(q == 0, 0.0, beta * factor * q * over_t)
    over = term > clip
    if CLIP:
        slope = tl.where(over, 0.0, slope)
        term = tl.where(over, clip, term)
    return term.to(FLOAT), slope.to(FLOAT), p, over


@_jit
def _row_loss(
    student, teacher, log_sum, teacher_log_sum, loss, clipped, slope_sum,
    V, stride, teacher_stride, inverse, beta, factor, clip,
    FLOAT: tl.constexpr, KIND: tl.constexpr, CLIP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute Σ f, the share of capped entries, and Σ g of one row."""
    row = tl.program_id(0).to(tl.int64)
    z = tl.load(log_sum + row)
    teacher_z = tl.load(teacher_log_sum + row)
    beta = tl.full((), beta, FLOAT)
    total = tl.zeros((), FLOAT)
    capped = tl.zeros((), FLOAT)
    slopes = tl.zeros((), FLOAT)
    for start in range(0, V, BLOCK):
        at = start + tl.arange(0, BLOCK)
        there = at < V
        s = tl.load(student + row * stride + at, mask=there, other=0.0).to(FLOAT) * inverse - z
        t = tl.load(teacher + row * teacher_stride + at, mask=there, other=0.0).to(FLOAT) * inverse
        term, slope, _, cap = _term_slope_mass(
            s, t - teacher_z, beta, factor, clip, FLOAT, KIND, CLIP
        )
        total += tl.sum(tl.where(there, term, 0.0), axis=0)
        slopes += tl.sum(tl.where(there, slope, 0.0), axis=0)
        if CLIP:
            capped += tl.sum(tl.where(there & cap, 1.0, 0.0).to(FLOAT), axis=0)
    tl.store(loss + row, total)
    tl.store(slope_sum + row, slopes)
    tl.store(clipped + row, capped / V)


@_jit
def _gradient(
    student, teacher, log_sum, teacher_log_sum, slope_sum, grad_loss, grad,
    V, stride, teacher_stride, inverse, beta, factor, clip,
    FLOAT: tl.constexpr, KIND: tl.constexpr, CLIP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute (g - s Σ g) / T times the gradient of the row's loss, for one block of one row."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = at < V
    s = tl.load(student + row * stride + at, mask=there, other=0.0).to(FLOAT) * inverse
    t = tl.load(teacher + row * teacher_stride + at, mask=there, other=0.0).to(FLOAT) * inverse
    _, slope, mass, _ = _term_slope_mass(
        s - tl.load(log_sum + row), t - tl.load(teacher_log_sum + row),
        tl.full((), beta, FLOAT), factor, clip, FLOAT, KIND, CLIP,
    )  # fmt: skip
    value = (slope - mass * tl.load(slope_sum + row)) * (tl.load(grad_loss + row) * inverse)
    tl.store(grad + row * V + at, value.to(grad.dtype.element_ty), mask=there)


@_jit
def _tail_gradient(
    student, log_tail, tail_slope, grad, V, stride, inverse,
    FLOAT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute the tail's slope times each entry's share of the tail, for one block of one row."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = at < V
    tail = tl.load(log_tail + row)
    tail = tl.where(tail == -float("inf"), 0.0, tail).to(FLOAT)
    x = tl.load(student + row * stride + at, mask=there, other=0.0).to(FLOAT) * inverse
    value = tl.exp(x - tail) * tl.load(tail_slope + row)
    tl.store(grad + row * V + at, value.to(grad.dtype.element_ty), mask=there)


@_jit
def _token_gradient(
    logits, ids, log_sum, grad_logp, grad, V, stride, inverse,
    FLOAT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute (1[entry = id] - p) / T times the row's gradient, for one block of one row."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = at < V
    x = tl.load(logits + row * stride + at, mask=there, other=0.0).to(FLOAT) * inverse
    is_id = tl.where(at == tl.load(ids + row), 1.0, 0.0)
    value = (is_id - tl.exp(x - tl.load(log_sum + row))) * (tl.load(grad_logp + row) * inverse)
    tl.store(grad + row * V + at, value.to(grad.dtype.element_ty), mask=there)


class RowSums(NamedTuple):
    """Holds what `row_sums` returns for each row, at a temperature, in float32 at least."""

    logp_N: Tensor
    """Log-probability of the id (nats)."""
    log_sum_N: Tensor
    """Log-sum-exp of all entries."""
    log_tail_N: Tensor | None
    """Log-sum-exp of the tail, -inf where it is empty."""


def row_sums(
    logits_NV: Tensor, ids_N: Tensor, temperature: float, top_k_NV: Tensor | None = None
) -> RowSums:
    """Compute log-sum-exps of logits over ``temperature``; ``top_k_NV``: bytes, 0 in the tail."""
    logits_NV = _rows(logits_NV)
    dtype = torch.promote_types(logits_NV.dtype, torch.float32)
    logp_N, log_sum_N = (logits_NV.new_empty(len(logits_NV), dtype=dtype) for _ in range(2))
    log_tail_N = None if top_k_NV is None else torch.empty_like(logp_N)
    _launch(
        _row_sums, logits_NV, 1, logits_NV, ids_N.contiguous(), top_k_NV, logp_N, log_sum_N,
        log_tail_N, logits_NV.shape[1], logits_NV.stride(0), 1 / temperature, TAIL=top_k_NV is not None,
    )  # fmt: skip
    return RowSums(logp_N, log_sum_N, log_tail_N)


class RowLosses(NamedTuple):
    """Holds what `losses` returns for each row, in float32 at least."""

    loss_N: Tensor
    clipped_N: Tensor
    """Share of the entries whose term was capped."""
    slope_sum_N: Tensor


class RowSides(NamedTuple):
    """Holds both sides' logits [N, V] and log-sum-exps [N] at one temperature."""

    student_NV: Tensor
    teacher_NV: Tensor
    log_sum_N: Tensor
    teacher_log_sum_N: Tensor


def losses(
    sides: RowSides, kind: str, beta: float, factor: float, clip: float | None, temperature: float
) -> RowLosses:
    """Compute the divergence of each row; ``factor`` multiplies every term of a JSD."""
    student_NV, teacher_NV = _rows(sides.student_NV), _rows(sides.teacher_NV)
    loss_N, clipped_N, slope_sum_N = (torch.empty_like(sides.log_sum_N) for _ in range(3))
    _launch(
        _row_loss, student_NV, 1, student_NV, teacher_NV, *sides[2:], loss_N, clipped_N,
        slope_sum_N, student_NV.shape[1], student_NV.stride(0), teacher_NV.stride(0), 1 / temperature,
        beta, factor, math.inf if clip is None else clip, KIND=KINDS[kind], CLIP=clip is not None,
    )  # fmt: skip
    return RowLosses(loss_N, clipped_N, slope_sum_N)


def loss_gradient(
    sides: RowSides, slope_sum_N: Tensor, grad_loss_N: Tensor,
    kind: str, beta: float, factor: float, clip: float | None, temperature: float,
) -> Tensor:  # fmt: skip
    """Compute the gradient [N, V] of Σ grad_loss times loss in the student's logits, in their dtype."""
    student_NV, teacher_NV = _rows(sides.student_NV), _rows(sides.teacher_NV)
    grad_NV = torch.empty(student_NV.shape, dtype=student_NV.dtype, device=student_NV.device)
    _launch(
        _gradient, student_NV, 0, student_NV, teacher_NV, *sides[2:], slope_sum_N,
        grad_loss_N.contiguous(), grad_NV, student_NV.shape[1], student_NV.stride(0),
        teacher_NV.stride(0), 1 / temperature, beta, factor, math.inf if clip is None else clip,
        KIND=KINDS[kind], CLIP=clip is not None,
    )  # fmt: skip
    return grad_NV


def tail_gradient(
    logits_NV: Tensor, log_tail_N: Tensor, slope_N: Tensor, temperature: float
) -> Tensor:
    """Distribute ``slope`` as if all entries were the tail's; the caller overwrites the top K."""
    logits_NV = _rows(logits_NV)
    grad_NV = torch.empty(logits_NV.shape, dtype=logits_NV.dtype, device=logits_NV.device)
    _launch(
        _tail_gradient, logits_NV, 0, logits_NV, log_tail_N, slope_N.contiguous(),
        grad_NV, logits_NV.shape[1], logits_NV.stride(0), 1 / temperature,
    )  # fmt: skip
    return grad_NV


def token_gradient(
    logits_NV: Tensor, ids_N: Tensor, log_sum_N: Tensor, grad_logp_N: Tensor, temperature: float
) -> Tensor:
    """Compute the gradient [N, V] of Σ grad_logp times log p(id) in the logits, in their dtype."""
    logits_NV = _rows(logits_NV)
    grad_NV = torch.empty(logits_NV.shape, dtype=logits_NV.dtype, device=logits_NV.device)
    _launch(
        _token_gradient, logits_NV, 0, logits_NV, ids_N.contiguous(), log_sum_N,
        grad_logp_N.contiguous(), grad_NV, logits_NV.shape[1], logits_NV.stride(0), 1 / temperature,
    )  # fmt: skip
    return grad_NV


def _rows(logits_NV: Tensor) -> Tensor:
    return logits_NV if logits_NV.stride(-1) == 1 else logits_NV.contiguous()


def _launch(kernel: Any, logits_NV: Tensor, whole_rows: int, *args: Any, **flags: Any) -> None:
    """Start a program for each row, or for each block of each row; none for no rows."""
    rows, entries = logits_NV.shape
    if not rows:
        return
    block = min(BLOCK, max(16, triton.next_power_of_2(entries)))  # pyright: ignore
    wide = logits_NV.dtype == torch.float64
    options: Mapping[str, Any] = {
        **flags, "FLOAT": tl.float64 if wide else tl.float32, "BLOCK": block,
        "num_warps": max(1, min(16, block // 256)),
    }  # fmt: skip
    grid = (rows,) if whole_rows else (rows, triton.cdiv(entries, block))  # pyright: ignore
    with torch.cuda.device_of(logits_NV):
        kernel[grid](*args, **options)
