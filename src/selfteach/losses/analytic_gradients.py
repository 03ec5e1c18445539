"""Compute a divergence's value and gradient in one pass over logits, without autograd's temporaries.

Each divergence is a sum over entries of terms f(log s), so its gradient in the student's logits is
``g - s Σg`` with ``g = df / d log s``, a formula short enough to write into the buffers of the
log-probabilities. These hold a few rows at a time, few enough for a CPU's cache: only the gradient
has the size of the logits.

A tail bucket b that sums the entries i has ``d log b / d z_i = s_i / b - s_i``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from selfteach.losses.divergence_spec import LARGEST_DIFFERENCE, Divergence
from selfteach.losses.kernels import row_kernels

BLOCK_ENTRIES = {"cpu": 2**17, "cuda": 2**24}
"""Entries of the rows that are processed at a time: a few such buffers fit in a cache of megabytes; a
GPU is faster with few, large calls."""
GROUP = 64
"""Entries per group in `largest`, which searches the groups with the largest maxima first."""


def scaled(logits: Tensor, temperature: float) -> Tensor:
    """Return ``logits / temperature`` in float32 at least; no copy where they are that already."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return wide if temperature == 1 else wide / temperature


def block_rows(logits_NV: Tensor) -> int:
    """Return how many rows of logits are processed at a time on their device."""
    most = BLOCK_ENTRIES.get(logits_NV.device.type, BLOCK_ENTRIES["cuda"])
    return max(1, most // max(1, logits_NV.shape[-1]))


def divergence_of_rows(
    student_logits: Tensor,
    teacher_logits: Tensor,
    ids: Tensor,
    spec: Divergence,
    *,
    donate_teacher_logits: bool = False,
) -> tuple[Tensor, ...]:
    """Compute (loss, share clipped, log s(y), log t(y)) per row from logits; ``loss`` has a gradient.

    The log-probabilities of the tokens y are at the divergence's temperature, in float32 at least.
    Differentiable once, in the student's logits, which are not written to. With
    ``donate_teacher_logits`` the gradient may overwrite the teacher's logits: the caller must not read
    them again, nor call backward twice.
    """
    fused = row_kernels.runs(student_logits, teacher_logits)
    rows = FusedRows if fused else Rows
    return rows.apply(student_logits, teacher_logits, ids, spec, donate_teacher_logits)  # pyright: ignore


class Rows(torch.autograd.Function):
    """Implements `divergence_of_rows` on any device."""

    @staticmethod
    def forward(
        ctx: Any, student_logits: Tensor, teacher_logits: Tensor, ids: Tensor, spec: Divergence,
        donate_teacher_logits: bool,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """Compute values, and the gradient where one is needed."""
        entries = student_logits.shape[-1]
        student_NV, teacher_NV = (x.reshape(-1, entries) for x in (student_logits, teacher_logits))
        grad_NV = None
        if ctx.needs_input_grad[0]:
            grad_NV = _gradient_buffer(student_NV, teacher_NV if donate_teacher_logits else None)
        values = _row_values(spec, student_NV, teacher_NV, ids.reshape(-1, 1), grad_NV)
        loss, clipped, logp, teacher_logp = (x.reshape(ids.shape) for x in values)
        if grad_NV is not None:
            ctx.save_for_backward(grad_NV.reshape(student_logits.shape))
        ctx.donate_teacher_logits = donate_teacher_logits
        ctx.mark_non_differentiable(clipped, logp, teacher_logp)
        ctx.set_materialize_grads(False)
        return loss, clipped, logp, teacher_logp

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_loss: Tensor | None, *_: None
    ) -> tuple[Tensor | None, None, None, None, None]:
        """Scale the saved gradient by each row's gradient of the loss."""
        if grad_loss is None:
            return None, None, None, None, None
        (grad,) = ctx.saved_tensors  # raises if an earlier backward scaled it in place
        scale = grad_loss[..., None]
        grad = grad.mul_(scale) if ctx.donate_teacher_logits else grad * scale
        return grad, None, None, None, None


def _gradient_buffer(student_NV: Tensor, donated_NV: Tensor | None) -> Tensor:
    """Return a buffer for the gradient in the student's logits, in float32 at least: the donated logits
    where their dtype and layout allow."""
    dtype = torch.promote_types(student_NV.dtype, torch.float32)
    if donated_NV is not None and donated_NV.dtype == dtype and donated_NV.is_contiguous():
        return donated_NV
    return torch.empty_like(student_NV, dtype=dtype)


def _row_values(
    spec: Divergence, student_NV: Tensor, teacher_NV: Tensor, ids_N1: Tensor, grad_NV: Tensor | None
) -> tuple[Tensor, ...]:
    """Compute the divergence of all rows, a block at a time; their gradient goes into ``grad_NV``.

    ``grad_NV`` may be either side's logits: a row is read before it is written.
    """
    values, rows = list[tuple[Tensor, ...]](), block_rows(student_NV)
    of_block = _buckets if spec.has_tail(student_NV.shape[-1]) else _all_entries
    for start in range(0, max(1, len(student_NV)), rows):
        block = slice(start, start + rows)
        grad = None if grad_NV is None else grad_NV[block]
        values.append(of_block(spec, student_NV[block], teacher_NV[block], ids_N1[block], grad))
        if grad is not None and spec.temperature != 1:
            grad.div_(spec.temperature)
    return tuple(map(torch.cat, zip(*values, strict=True)))


def _all_entries(
    spec: Divergence, student: Tensor, teacher: Tensor, ids: Tensor, grad: Tensor | None
) -> tuple[Tensor, ...]:
    """Compute the divergence of a block of rows, with a term for every entry of the vocabulary."""
    student, teacher = (_log_softmax(x, spec.temperature) for x in (student, teacher))
    logp, teacher_logp = (x.gather(-1, ids)[..., 0] for x in (student, teacher))
    loss, clipped, slope, mass = _entries(spec, student, teacher)
    if grad is not None:
        torch.addcmul(slope, mass, slope.sum(-1, keepdim=True), value=-1, out=grad)
    return loss, clipped, logp, teacher_logp


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    """Return log-probabilities in a new buffer, in float32 at least."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    if temperature == 1:
        return logits.log_softmax(-1, dtype=dtype)
    return scaled(logits, temperature).log_softmax(-1)


def _entries(spec: Divergence, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute loss, share clipped, slope g and mass s from log s and log t, which are overwritten.

    g may be off by a multiple of s, and the mass by a factor that g shares: ``g - s Σg`` cancels both.
    """
    clip = spec.clip
    match spec.kind:
        case "forward_kl":
            terms = _terms(t, s, into=torch.empty_like(t))  # t is now the mass
            slope, mass = t.neg_(), s.exp_()
        case "reverse_kl":
            terms = _terms(s, t, into=t)  # s is now the mass
            # Unclipped, adding the + s of g would only lose digits.
            slope, mass = (terms if clip is None else terms + s), s
        case _:
            terms, slope, mass = _jsd(s, t, spec.beta, spec.jsd_factor)
    if clip is None:
        loss = terms.sum(-1)
        return loss, torch.zeros_like(loss), slope, mass
    over = terms > clip
    clipped, loss = over.to(terms.dtype).mean(-1), terms.clamp(max=clip).sum(-1)
    return loss, clipped, slope.masked_fill_(over, 0.0), mass


def _terms(p: Tensor, q: Tensor, *, into: Tensor) -> Tensor:
    """Compute p log(p/q) from log-probabilities into a buffer, which may be q's; p becomes its mass.

    Where the mass is zero, or too small for the dtype, the term is 0 whatever q is.
    """
    torch.sub(p, q, out=into)
    p.exp_()
    return into.masked_fill_(p == 0, 0.0).mul_(p)


def _jsd(s: Tensor, t: Tensor, beta: float, factor: float) -> tuple[Tensor, Tensor, Tensor]:
    """Compute terms, g = (1 - beta) s log(s/m), and mass s. The slope of the mixture m cancels."""
    over_t, over_s = _log_ratios_to_mixture(torch.sub(t, s), beta)
    slope = over_s.masked_fill_(s.exp_() == 0, 0.0).mul_(s).mul_(1 - beta)
    terms = over_t.masked_fill_(t.exp_() == 0, 0.0).mul_(t).mul_(beta).add_(slope)
    if factor != 1:
        terms.mul_(factor)
        slope.mul_(factor)
    return terms, slope, s


def _log_ratios_to_mixture(difference: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Do what `divergence.log_ratios_to_mixture` does, in two buffers, one of them the argument's."""
    difference.clamp_(-LARGEST_DIFFERENCE, LARGEST_DIFFERENCE)
    if beta <= 0.5:
        from_s = difference.expm1().mul_(beta).log1p_()
        return difference.sub_(from_s), from_s.neg_()
    from_t = difference.neg_().expm1().mul_(1 - beta).log1p_()
    over_s = difference.sub_(from_t)
    return from_t.neg_(), over_s


def _buckets(
    spec: Divergence, student: Tensor, teacher: Tensor, ids: Tensor, grad: Tensor | None
) -> tuple[Tensor, ...]:
    """Compute the divergence of a block of rows, with all but K entries summed into one bucket."""
    assert spec.top_k is not None
    dtype = torch.promote_types(student.dtype, torch.float32)
    s, t = (x.to(dtype, copy=True) for x in (student, teacher))
    if spec.temperature != 1:
        s, t = s.div_(spec.temperature), t.div_(spec.temperature)
    index = largest(s if spec.top_k_from == "student" else t, spec.top_k)
    bins, logp, shares = _sum_tail(s, index, ids)
    teacher_bins, teacher_logp, _ = _sum_tail(t, index, ids)
    loss, clipped, slope, mass = _entries(spec, bins, teacher_bins)
    slope = slope.addcmul_(mass, slope.sum(-1, keepdim=True), value=-1)
    if grad is not None:
        torch.mul(shares, slope[..., -1:], out=grad)
        grad.scatter_(-1, index, slope[..., :-1].to(grad.dtype))
    return loss, clipped, logp, teacher_logp


def largest(rows: Tensor, k: int) -> Tensor:
    """Return the indices [N, K] of the K largest entries of each row [N, V], in any order.

    On a CPU `torch.topk` writes a (value, index) pair for every entry. The K largest lie in the K
    groups whose maxima are largest, so only these are searched: a third of the time at V = 151,936.
    Which of several equal entries is returned is as unspecified as with `torch.topk`.
    """
    entries = rows.shape[-1]
    groups = entries // GROUP
    if not rows.is_cpu or groups < 2 * k:
        return rows.topk(k, dim=-1, sorted=False).indices
    split = groups * GROUP  # group j is every entry j + i * groups: maxima of whole lines are fast
    best = rows[:, :split].unflatten(-1, (GROUP, groups)).amax(-2).topk(k, sorted=False).indices
    lines = torch.arange(0, split, groups)[:, None]
    candidates = (best[:, None, :] + lines).flatten(1)
    if split < entries:
        remainder = torch.arange(split, entries).expand(len(rows), -1)
        candidates = torch.cat([candidates, remainder], dim=1)
    chosen = rows.gather(-1, candidates).topk(k, sorted=False).indices
    return candidates.gather(-1, chosen)


def _sum_tail(logits: Tensor, index: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return log-probabilities of top K and tail, log p(id), and each entry's share of the tail.

    Overwrites the top K of ``logits`` with -inf. With an empty tail all shares are 0.
    """
    id_logit, top = logits.gather(-1, ids)[..., 0], logits.gather(-1, index)
    highest = logits.scatter_(-1, index, -math.inf).amax(-1, keepdim=True)
    empty = highest == -math.inf
    # A softmax is half the work of a log-sum-exp and an exp; its largest entry gives the sum.
    shares = logits.softmax(-1)
    if not empty.is_cpu or empty.any():  # no synchronisation with a GPU just to skip this
        shares.masked_fill_(empty, 0.0)
    tail = torch.where(empty, highest, highest - shares.amax(-1, keepdim=True).log())
    bins = torch.cat([top, tail], dim=-1)
    log_sum = bins.logsumexp(-1, keepdim=True)
    return bins - log_sum, id_logit - log_sum[..., 0], shares


class FusedRows(torch.autograd.Function):
    """Implements `divergence_of_rows` with Triton; the backward pass computes the gradient."""

    @staticmethod
    def forward(
        ctx: Any, student_logits: Tensor, teacher_logits: Tensor, ids: Tensor, spec: Divergence,
        donate_teacher_logits: bool,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """Compute values; saves both sides' logits and a few numbers per row. Overwrites no logits."""
        entries = student_logits.shape[-1]
        student_NV, teacher_NV = (x.reshape(-1, entries) for x in (student_logits, teacher_logits))
        of = _fused_buckets if spec.has_tail(entries) else _fused_entries
        values, row_stats = of(spec, student_NV, teacher_NV, ids.reshape(-1))
        ctx.spec, ctx.shape = spec, student_logits.shape
        ctx.save_for_backward(student_NV, teacher_NV, *row_stats)
        loss, clipped, logp, teacher_logp = (x.reshape(ids.shape) for x in values)
        ctx.mark_non_differentiable(clipped, logp, teacher_logp)
        ctx.set_materialize_grads(False)
        return loss, clipped, logp, teacher_logp

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_loss: Tensor | None, *_: None
    ) -> tuple[Tensor | None, None, None, None, None]:
        """Compute the gradient times each row's gradient of the loss, in the logits' dtype."""
        if grad_loss is None or not ctx.needs_input_grad[0]:
            return None, None, None, None, None
        student_NV, teacher_NV, *row_stats = ctx.saved_tensors
        has_tail = ctx.spec.has_tail(student_NV.shape[1])
        of = _buckets_gradient if has_tail else _entries_gradient
        grad_NV = of(ctx.spec, student_NV, teacher_NV, grad_loss.reshape(-1), *row_stats)
        return grad_NV.reshape(ctx.shape), None, None, None, None


def _fused_entries(
    spec: Divergence, student: Tensor, teacher: Tensor, ids: Tensor
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Compute the divergence of rows, and per row both log-sum-exps and Σg for `_entries_gradient`."""
    sums, teacher_sums = (
        row_kernels.row_sums(x, ids, spec.temperature) for x in (student, teacher)
    )
    sides = row_kernels.RowSides(student, teacher, sums.log_sum_N, teacher_sums.log_sum_N)
    losses = row_kernels.losses(
        sides, spec.kind, spec.beta, spec.jsd_factor, spec.clip, spec.temperature
    )
    values = (losses.loss_N, losses.clipped_N, sums.logp_N, teacher_sums.logp_N)
    return values, (sums.log_sum_N, teacher_sums.log_sum_N, losses.slope_sum_N)


def _entries_gradient(
    spec: Divergence, student: Tensor, teacher: Tensor, grad_loss: Tensor,
    log_sum: Tensor, teacher_log_sum: Tensor, slope_sum: Tensor,
) -> Tensor:  # fmt: skip
    sides = row_kernels.RowSides(student, teacher, log_sum, teacher_log_sum)
    return row_kernels.loss_gradient(
        sides, slope_sum, grad_loss, spec.kind, spec.beta, spec.jsd_factor, spec.clip,
        spec.temperature,
    )  # fmt: skip


def _fused_buckets(
    spec: Divergence, student: Tensor, teacher: Tensor, ids: Tensor
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Compute what `_fused_entries` does with a tail bucket; a byte per entry flags the top K.

    Saved per row: the top K's indices, the log-sum-exp of the tail's logits, and g of the K + 1.
    """
    assert spec.top_k is not None
    index = (student if spec.top_k_from == "student" else teacher).topk(spec.top_k).indices
    in_top_k = torch.zeros(student.shape, dtype=torch.uint8, device=student.device)
    in_top_k.scatter_(-1, index, 1)
    sides = [row_kernels.row_sums(x, ids, spec.temperature, in_top_k) for x in (student, teacher)]
    log_probs = []
    for logits, sums in zip((student, teacher), sides, strict=True):
        assert sums.log_tail_N is not None
        top = logits.gather(-1, index).to(sums.log_sum_N.dtype) / spec.temperature
        bins = torch.cat([top, sums.log_tail_N[:, None]], dim=-1)
        log_probs.append(bins - sums.log_sum_N[:, None])
    loss, clipped, slope, mass = _entries(spec, *log_probs)
    slope = slope - mass * slope.sum(-1, keepdim=True)
    values = (loss, clipped, sides[0].logp_N, sides[1].logp_N)
    return values, (index, sides[0].log_tail_N, slope)  # pyright: ignore[reportReturnType]


def _buckets_gradient(
    spec: Divergence, student: Tensor, _teacher: Tensor, grad_loss: Tensor,
    index: Tensor, log_tail: Tensor, slope: Tensor,
) -> Tensor:  # fmt: skip
    slope = slope * (grad_loss[:, None] / spec.temperature)
    grad = row_kernels.tail_gradient(student, log_tail, slope[:, -1], spec.temperature)
    return grad.scatter_(-1, index, slope[:, :-1].to(grad.dtype))
