# pyright: reportInvalidTypeForm=false
"""Compute divergences from hidden states with Triton: both heads' logits stay in registers.

A program multiplies a block of rows by a block of both heads' entries, into float32, and reduces the
tile to running sums per row, or to the tile's gradient. So the only tensor of the logits' kind in
memory is their gradient, in bf16/fp16 and for a block of the vocabulary at a time. The price is that
logits are computed once for the sums and again for the gradient (and once more where a term needs
both sides' sums first: a JSD, a capped term).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from selfteach.losses.kernels.row_kernels import KINDS, _jit, _term_slope_mass, tl, triton
from selfteach.models.matmul import HALF_DTYPES


@dataclass(frozen=True, slots=True)
class Tiling:
    """Describes how a kernel splits its work into tiles."""

    rows: int = 128
    entries: int = 128
    inner: int = 64
    """Columns of the hidden states per step of a tile's matmul."""
    warps: int = 8
    stages: int = 4


SUMS, GRADIENT = Tiling(), Tiling()
"""The fastest of sixteen on an H200: `benchmarks/loss/divergences_gpu.py --parts tilings`."""
PROGRAMS = 528
"""Most programs that sums are split among: four for each of 132 multiprocessors."""
BLOCK_BYTES = 32 * 2**20
"""Bytes of the gradient in the logits that are in memory at a time."""


def runs(*states: Tensor) -> bool:
    """Return True where the kernels support these hidden states and heads."""
    return triton is not None and all(x.is_cuda and x.dtype in HALF_DTYPES for x in states)


class LinearSides(NamedTuple):
    """Holds hidden states [N, H] and heads [V, H] of both sides, rows contiguous."""

    student_NH: Tensor
    student_VH: Tensor
    teacher_NH: Tensor
    teacher_VH: Tensor


@_jit
def _tile(
    hidden, head, rows, entries, H, hidden_stride, head_stride,
    EVEN: tl.constexpr, ROWS: tl.constexpr, ENTRIES: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """Compute the logits of a block of rows and entries, in float32."""
    inner = tl.arange(0, INNER)
    a_at = hidden + rows.to(tl.int64)[:, None] * hidden_stride + inner[None, :]
    b_at = head + entries.to(tl.int64)[None, :] * head_stride + inner[:, None]
    tile = tl.zeros((ROWS, ENTRIES), tl.float32)
    for start in range(0, H, INNER):
        if EVEN:
            a = tl.load(a_at)
            b = tl.load(b_at)
        else:
            a = tl.load(a_at, mask=(start + inner)[None, :] < H, other=0.0)
            b = tl.load(b_at, mask=(start + inner)[:, None] < H, other=0.0)
        tile = tl.dot(a, b, tile, input_precision="ieee")
        a_at += INNER
        b_at += INNER
    return tile


@_jit
def _sums(
    student, student_head, teacher, teacher_head, ids, out,
    N, V, H, TH, student_stride, head_stride, teacher_stride, teacher_head_stride,
    splits, per_split,
    KIND: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr, ENTRIES: tl.constexpr,
    INNER: tl.constexpr,
):  # fmt: skip
    """Compute per row, over a part of the vocabulary, what `sums` combines.

    0, 1: the student's largest logit m and Σ exp(x - m); 2, 3: the teacher's; 4: the mass-weighted gap
    of the KL's first side to its second; 5, 6: both sides' logit of the row's id.
    """
    # Programs that run at the same time read the same part of the heads, which is then cached.
    blocks = tl.cdiv(N, ROWS)
    block = tl.program_id(0) % blocks
    split = tl.program_id(0) // blocks
    rows = block * ROWS + tl.arange(0, ROWS)
    safe = tl.minimum(rows, N - 1)
    row_ids = tl.load(ids + safe)
    high = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    teacher_high = tl.full((ROWS,), -float("inf"), tl.float32)
    teacher_total = tl.zeros((ROWS,), tl.float32)
    gap = tl.zeros((ROWS,), tl.float32)
    at_id = tl.zeros((ROWS,), tl.float32)
    teacher_at_id = tl.zeros((ROWS,), tl.float32)
    for start in range(split * per_split, tl.minimum((split + 1) * per_split, V), ENTRIES):
        entries = start + tl.arange(0, ENTRIES)
        there = (entries < V)[None, :]
        inside = tl.minimum(entries, V - 1)
        s = _tile(
            student, student_head, safe, inside, H, student_stride, head_stride,
            EVEN, ROWS, ENTRIES, INNER,
        )  # fmt: skip
        t = _tile(
            teacher, teacher_head, safe, inside, TH, teacher_stride, teacher_head_stride,
            EVEN, ROWS, ENTRIES, INNER,
        )  # fmt: skip
        is_id = there & (entries[None, :] == row_ids[:, None])
        at_id += tl.sum(tl.where(is_id, s, 0.0), axis=1)
        teacher_at_id += tl.sum(tl.where(is_id, t, 0.0), axis=1)
        top = tl.maximum(high, tl.max(tl.where(there, s, -float("inf")), axis=1))
        mass = tl.where(there, tl.exp(s - top[:, None]), 0.0)
        shrink = tl.exp(high - top)
        total = total * shrink + tl.sum(mass, axis=1)
        high = top
        if KIND == 1:
            gap = gap * shrink + tl.sum(mass * (s - t), axis=1)
        top = tl.maximum(teacher_high, tl.max(tl.where(there, t, -float("inf")), axis=1))
        mass = tl.where(there, tl.exp(t - top[:, None]), 0.0)
        shrink = tl.exp(teacher_high - top)
        teacher_total = teacher_total * shrink + tl.sum(mass, axis=1)
        teacher_high = top
        if KIND == 0:
            gap = gap * shrink + tl.sum(mass * (t - s), axis=1)
    at = out + split * N + rows
    valid = rows < N
    step = splits * N
    tl.store(at, high, mask=valid)
    tl.store(at + step, total, mask=valid)
    tl.store(at + 2 * step, teacher_high, mask=valid)
    tl.store(at + 3 * step, teacher_total, mask=valid)
    tl.store(at + 4 * step, gap, mask=valid)
    tl.store(at + 5 * step, at_id, mask=valid)
    tl.store(at + 6 * step, teacher_at_id, mask=valid)


@_jit
def _losses(
    student, student_head, teacher, teacher_head, log_sum, teacher_log_sum, out,
    N, V, H, TH, student_stride, head_stride, teacher_stride, teacher_head_stride,
    splits, per_split, beta, factor, clip,
    KIND: tl.constexpr, CLIP: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr,
    ENTRIES: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """Compute Σ f, how many entries are capped, and Σ g of some rows and a part of the vocabulary."""
    blocks = tl.cdiv(N, ROWS)
    block = tl.program_id(0) % blocks
    split = tl.program_id(0) // blocks
    rows = block * ROWS + tl.arange(0, ROWS)
    safe = tl.minimum(rows, N - 1)
    z = tl.load(log_sum + safe)[:, None]
    teacher_z = tl.load(teacher_log_sum + safe)[:, None]
    loss = tl.zeros((ROWS,), tl.float32)
    capped = tl.zeros((ROWS,), tl.float32)
    slopes = tl.zeros((ROWS,), tl.float32)
    for start in range(split * per_split, tl.minimum((split + 1) * per_split, V), ENTRIES):
        entries = start + tl.arange(0, ENTRIES)
        there = (entries < V)[None, :]
        inside = tl.minimum(entries, V - 1)
        s = _tile(
            student, student_head, safe, inside, H, student_stride, head_stride,
            EVEN, ROWS, ENTRIES, INNER,
        )  # fmt: skip
        t = _tile(
            teacher, teacher_head, safe, inside, TH, teacher_stride, teacher_head_stride,
            EVEN, ROWS, ENTRIES, INNER,
        )  # fmt: skip
        term, slope, _, cap = _term_slope_mass(
            s - z, t - teacher_z, beta, factor, clip, tl.float32, KIND, CLIP
        )
        loss += tl.sum(tl.where(there, term, 0.0), axis=1)
        slopes += tl.sum(tl.where(there, slope, 0.0), axis=1)
        if CLIP:
            capped += tl.sum(tl.where(there & cap, 1.0, 0.0), axis=1)
    at = out + split * N + rows
    valid = rows < N
    tl.store(at, loss, mask=valid)
    tl.store(at + splits * N, capped, mask=valid)
    tl.store(at + 2 * splits * N, slopes, mask=valid)


@_jit
def _gradient_block(
    student, student_head, teacher, teacher_head, log_sum, teacher_log_sum, slope_sum, scale, grad,
    N, V, H, TH, student_stride, head_stride, teacher_stride, teacher_head_stride,
    first, width, beta, factor, clip,
    KIND: tl.constexpr, CLIP: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr,
    ENTRIES: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """Compute a tile of (g - s Σ g) times a row's scale; exactly 0 in a row whose scale is 0."""
    blocks = tl.cdiv(N, ROWS)
    rows = (tl.program_id(0) % blocks) * ROWS + tl.arange(0, ROWS)
    columns = (tl.program_id(0) // blocks) * ENTRIES + tl.arange(0, ENTRIES)
    safe = tl.minimum(rows, N - 1)
    inside = tl.minimum(first + columns, V - 1)
    s = _tile(
        student, student_head, safe, inside, H, student_stride, head_stride,
        EVEN, ROWS, ENTRIES, INNER,
    )  # fmt: skip
    t = _tile(
        teacher, teacher_head, safe, inside, TH, teacher_stride, teacher_head_stride,
        EVEN, ROWS, ENTRIES, INNER,
    )  # fmt: skip
    z = tl.load(log_sum + safe)[:, None]
    teacher_z = tl.load(teacher_log_sum + safe)[:, None]
    _, slope, mass, _ = _term_slope_mass(
        s - z, t - teacher_z, beta, factor, clip, tl.float32, KIND, CLIP
    )
    weight = tl.load(scale + safe)[:, None]
    value = tl.where(weight == 0, 0.0, (slope - mass * tl.load(slope_sum + safe)[:, None]) * weight)
    at = grad + rows.to(tl.int64)[:, None] * width + columns[None, :]
    here = (rows < N)[:, None] & (columns < width)[None, :]
    tl.store(at, value.to(grad.dtype.element_ty), mask=here)


class LinearSums(NamedTuple):
    """Holds what `sums` returns for each row, in float32 and nats."""

    log_sum_N: Tensor
    teacher_log_sum_N: Tensor
    logp_N: Tensor
    teacher_logp_N: Tensor
    kl_N: Tensor
    """KL(teacher ‖ student) or KL(student ‖ teacher) by kind; meaningless for a JSD."""


def sums(sides: LinearSides, ids_N: Tensor, kind: str) -> LinearSums:
    """Compute both sides' log-sum-exps and log-probabilities of ids, and a KL between the two."""
    N, V, tiling = len(sides.student_NH), len(sides.student_VH), SUMS
    splits, per_split = _splits(N, V, tiling)
    out = sides.student_NH.new_empty(7, splits, N, dtype=torch.float32)
    _launch(
        _sums, splits * triton.cdiv(N, tiling.rows), tiling, sides, ids_N.contiguous(), out,
        tail=(splits, per_split), KIND=KINDS[kind],
    )  # fmt: skip
    high, total, teacher_high, teacher_total, gap, at_id, teacher_at_id = out
    log_sum, top, scale = _combine(high, total)
    teacher_log_sum, teacher_top, teacher_scale = _combine(teacher_high, teacher_total)
    logp, teacher_logp = at_id.sum(0) - log_sum, teacher_at_id.sum(0) - teacher_log_sum
    if kind == "reverse_kl":
        kl = (scale * gap).sum(0) * (top - log_sum).exp() - log_sum + teacher_log_sum
    else:
        kl = (teacher_scale * gap).sum(0) * (teacher_top - teacher_log_sum).exp()
        kl = kl - teacher_log_sum + log_sum
    return LinearSums(log_sum, teacher_log_sum, logp, teacher_logp, kl)


def _combine(high: Tensor, total: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the log-sum-exp over splits [S, N], the largest logit, and each split's scale."""
    top = high.amax(0)
    scale = (high - top).exp()
    return top + (scale * total).sum(0).log(), top, scale


class LinearLosses(NamedTuple):
    """Holds what `losses` returns for each row."""

    loss_N: Tensor
    clipped_N: Tensor
    slope_sum_N: Tensor


def losses(
    sides: LinearSides, sums: LinearSums, kind: str, beta: float, factor: float, clip: float | None
) -> LinearLosses:
    """Compute the divergence, the share of capped terms and Σ g; an uncapped KL needs `sums` alone."""
    if clip is None and kind != "jsd":
        # Σ g of KL(t ‖ s) is -Σ t; of KL(s ‖ t), up to a multiple of s, the KL itself.
        slope_sum = sums.kl_N if kind == "reverse_kl" else torch.full_like(sums.kl_N, -1.0)
        return LinearLosses(sums.kl_N, torch.zeros_like(sums.kl_N), slope_sum)
    N, V, tiling = len(sides.student_NH), len(sides.student_VH), SUMS
    splits, per_split = _splits(N, V, tiling)
    out = sides.student_NH.new_empty(3, splits, N, dtype=torch.float32)
    _launch(
        _losses, splits * triton.cdiv(N, tiling.rows), tiling, sides, sums.log_sum_N,
        sums.teacher_log_sum_N, out, tail=(splits, per_split, beta, factor, _cap(clip)),
        KIND=KINDS[kind], CLIP=clip is not None,
    )  # fmt: skip
    loss, capped, slope_sum = out.sum(1)
    return LinearLosses(loss, capped / V, slope_sum)


def gradient_block(
    sides: LinearSides, sums: LinearSums, slope_sum_N: Tensor, scale_N: Tensor, into_NW: Tensor,
    first: int, kind: str, beta: float, factor: float, clip: float | None,
) -> None:  # fmt: skip
    """Write the gradient of Σ scale · divergence in the student's logits, W entries from ``first``."""
    (N, width), tiling = into_NW.shape, GRADIENT
    _launch(
        _gradient_block, triton.cdiv(N, tiling.rows) * triton.cdiv(width, tiling.entries), tiling,
        sides, sums.log_sum_N, sums.teacher_log_sum_N, slope_sum_N, scale_N, into_NW,
        tail=(first, width, beta, factor, _cap(clip)), KIND=KINDS[kind], CLIP=clip is not None,
    )  # fmt: skip


def _cap(clip: float | None) -> float:
    return math.inf if clip is None else clip


def _splits(N: int, V: int, tiling: Tiling) -> tuple[int, int]:
    """Return into how many parts the vocabulary is split, and the entries of each."""
    blocks = triton.cdiv(V, tiling.entries)
    splits = min(blocks, max(1, PROGRAMS // triton.cdiv(N, tiling.rows)))
    per_split = triton.cdiv(blocks, splits) * tiling.entries
    return triton.cdiv(V, per_split), per_split


def _launch(
    kernel: Any,
    programs: int,
    tiling: Tiling,
    sides: LinearSides,
    *args: Any,
    tail: tuple,
    **flags: Any,
) -> None:
    H, TH = sides.student_NH.shape[1], sides.teacher_NH.shape[1]
    with torch.cuda.device_of(sides.student_NH):
        kernel[(programs,)](
            *sides, *args, len(sides.student_NH), len(sides.student_VH), H, TH,
            *(x.stride(0) for x in sides), *tail, **flags,
            EVEN=H % tiling.inner == 0 == TH % tiling.inner, ROWS=tiling.rows,
            ENTRIES=tiling.entries, INNER=tiling.inner, num_warps=tiling.warps,
            num_stages=tiling.stages,
        )  # fmt: skip
