"""A divergence's value and gradient in one pass over logits, without autograd's temporaries.

Each divergence is a sum over entries of terms f(log s), so its gradient in the student's logits is
``g - s Σg`` with ``g = df / d log s``, a formula short enough to write into the buffers of the
log-probabilities. These are those of a few rows at a time, small enough for a processor's cache: of
the logits' own size is only the gradient.

A bucket b that gathers the entries i of a tail has ``d log b / d z_i = s_i / b - s_i``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from selfteach.losses.divergence_spec import Divergence
from selfteach.losses.kernels import row_kernels

BLOCK_ENTRIES = {"cpu": 2**17, "cuda": 2**24}
"""Entries of the rows that are worked on at a time: a few such buffers are in a cache of megabytes; a
GPU wants long work, and few calls."""
GROUP = 64
"""Entries of which `largest` looks at the largest first."""


def scaled(logits: Tensor, temperature: float) -> Tensor:
    """``logits / temperature`` in float32 at least; no copy where they are that already."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return wide if temperature == 1 else wide / temperature


def block_rows(logits_NV: Tensor) -> int:
    """How many rows of logits to work on at a time, on their device."""
    most = BLOCK_ENTRIES.get(logits_NV.device.type, BLOCK_ENTRIES["cuda"])
    return max(1, most // max(1, logits_NV.shape[-1]))


def of_rows(
    student_logits: Tensor,
    teacher_logits: Tensor,
    ids: Tensor,
    spec: Divergence,
    *,
    donate_teacher_logits: bool = False,
) -> tuple[Tensor, ...]:
    """(loss, share clipped, log s(y), log t(y)) per row from logits; ``loss`` has a gradient.

    The log-probabilities of the tokens y are at the divergence's temperature, in float32 at least.
    Differentiable once, in the student's logits, which are not written to. With ``donate_teacher_logits`` the teacher's
    are nobody else's: the gradient may take their place, and no backward may come a second time.
    """
    fused = row_kernels.runs(student_logits, teacher_logits)
    rows = FusedRows if fused else Rows
    return rows.apply(student_logits, teacher_logits, ids, spec, donate_teacher_logits)  # pyright: ignore


class Rows(torch.autograd.Function):
    """`of_rows` on any device."""

    @staticmethod
    def forward(
        ctx: Any, student_logits: Tensor, teacher_logits: Tensor, ids: Tensor, spec: Divergence,
        donate_teacher_logits: bool,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """Values, and the gradient where one is asked for."""
        entries = student_logits.shape[-1]
        student_NV, teacher_NV = (x.reshape(-1, entries) for x in (student_logits, teacher_logits))
        needed = ctx.needs_input_grad[0]
        grad_NV = (
            _room(student_NV, teacher_NV if donate_teacher_logits else None) if needed else None
        )
        told, _ = walked(spec, student_NV, teacher_NV, ids.reshape(-1, 1), grad_NV)
        loss, clipped, logp, teacher_logp = (x.reshape(ids.shape) for x in told)
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
        """The kept gradient times what each row's loss counts for."""
        if grad_loss is None:
            return None, None, None, None, None
        (grad,) = ctx.saved_tensors  # raises if it was scaled where it lies before
        scale = grad_loss[..., None]
        return (
            grad.mul_(scale) if ctx.donate_teacher_logits else grad * scale,
            None,
            None,
            None,
            None,
        )


def _room(student_NV: Tensor, spent_NV: Tensor | None) -> Tensor:
    """Where a gradient in the student's logits goes, in float32 at least: into logits that are read for
    the last time before, where there are some of its kind."""
    dtype = torch.promote_types(student_NV.dtype, torch.float32)
    if spent_NV is not None and spent_NV.dtype == dtype and spent_NV.is_contiguous():
        return spent_NV
    return torch.empty_like(student_NV, dtype=dtype)


Told = tuple[Tensor, ...]
"""What `of_rows` says of each row."""
Kept = tuple[Tensor, ...]
"""What each row's gradient can be made of again: log-sum-exps of both sides' logits (at the divergence's
temperature) and Σ g [N] each; or the kept entries [N, K], the log-sum-exp of the others and their g."""


def walked(
    spec: Divergence, student_NV: Tensor, teacher_NV: Tensor, ids_N1: Tensor, grad_NV: Tensor | None
) -> tuple[Told, Kept]:
    """All rows, a few at a time; their gradient goes into ``grad_NV``, in its dtype. It may be a side's
    logits: a row is read before it is written."""
    rows, said = block_rows(student_NV), list[tuple[Told, Kept]]()
    for start in range(0, max(1, len(student_NV)), rows):
        at = slice(start, start + rows)
        into = None if grad_NV is None else grad_NV[at]
        said.append(_block(spec, student_NV[at], teacher_NV[at], ids_N1[at], into))
    told, kept = (
        tuple(torch.cat(parts) for parts in zip(*(one[i] for one in said), strict=True))
        for i in (0, 1)
    )
    return told, kept


def gradient_of_slab(
    spec: Divergence, student_NW: Tensor, teacher_NW: Tensor | None, kept: Kept, first: int,
    scale_N: Tensor, into_NW: Tensor,
) -> None:  # fmt: skip
    """Of rows that have been walked, at temperature 1: the gradient of Σ scale times loss in the logits
    of W entries from ``first`` on, in the dtype of ``into_NW``. Both sides' logits of these entries are
    given; the teacher's may be None where only K entries are kept.
    """
    rows = block_rows(student_NW)
    dtype = torch.promote_types(student_NW.dtype, torch.float32)
    for start in range(0, len(student_NW), rows):
        at = slice(start, start + rows)
        own, scale = [x[at] for x in kept], scale_N[at, None]
        s = student_NW[at].to(dtype, copy=True)
        if teacher_NW is not None:
            log_sum, teacher_log_sum, slope_sum = own
            t = teacher_NW[at].to(dtype, copy=True).sub_(teacher_log_sum[:, None])
            _, _, slope, mass = _entries(spec, s.sub_(log_sum[:, None]), t)
            slope.addcmul_(mass, slope_sum[:, None], value=-1)
            torch.mul(slope, scale, out=s)
        else:
            index, log_tail, slope = own
            empty = (log_tail == -math.inf)[:, None]
            s.sub_(log_tail[:, None]).exp_().mul_(slope[:, -1:] * scale).masked_fill_(empty, 0.0)
            inside = (index >= first) & (index < first + s.shape[1])
            row, place = inside.nonzero(as_tuple=True)
            s[row, index[row, place] - first] = (slope[:, :-1] * scale)[row, place]
        into_NW[at] = s


def _block(
    spec: Divergence, student: Tensor, teacher: Tensor, ids: Tensor, grad: Tensor | None
) -> tuple[Told, Kept]:
    """`walked` for a few rows."""
    if not spec.has_tail(student.shape[-1]):
        own = [
            x.gather(-1, ids)[..., 0].to(torch.promote_types(x.dtype, torch.float32))
            for x in (student, teacher)
        ]
        student, teacher = (_log_softmax(x, spec.temperature) for x in (student, teacher))
        logp, teacher_logp = (x.gather(-1, ids)[..., 0] for x in (student, teacher))
        loss, clipped, slope, mass = _entries(spec, student, teacher)
        slope_sum = slope.sum(-1)
        if grad is not None:
            torch.addcmul(slope, mass, slope_sum[..., None], value=-1, out=grad)
        log_sums = [
            x / spec.temperature - p for x, p in zip(own, (logp, teacher_logp), strict=True)
        ]
        told, kept = (loss, clipped, logp, teacher_logp), (*log_sums, slope_sum)
    else:
        told, kept = _buckets(spec, student, teacher, ids, grad)
    if grad is not None and spec.temperature != 1:
        grad.div_(spec.temperature)
    return told, kept


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    """In a buffer of its own, float32 at least."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    if temperature == 1:
        return logits.log_softmax(-1, dtype=dtype)
    return scaled(logits, temperature).log_softmax(-1)


def _entries(spec: Divergence, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, share clipped, g and mass s (up to a factor that g knows of); overwrites log s, log t.

    g may be short of a multiple of s: the correction takes that out anyway.
    """
    clip = spec.clip
    match spec.kind:
        case "forward_kl":
            terms = _terms(t, s, into=torch.empty_like(t))  # t is now the mass
            slope, mass = t.neg_(), s.exp_()
        case "reverse_kl":
            terms = _terms(s, t, into=t)  # s is now the mass
            # Unclipped the constant + s of g would only cost digits.
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
    """p log(p/q) from log-probabilities into a buffer, which may be q's; p becomes its mass.

    Where the mass is zero, or too small for the dtype, the term is 0 whatever q is.
    """
    torch.sub(p, q, out=into)
    p.exp_()
    return into.masked_fill_(p == 0, 0.0).mul_(p)


def _jsd(s: Tensor, t: Tensor, beta: float, factor: float) -> tuple[Tensor, Tensor, Tensor]:
    """Terms, g = (1 - beta) s log(s/m), and the mass s. The mixture's own slope cancels."""
    mixture = s + (math.log1p(-beta) - math.log(beta))
    torch.logaddexp(t, mixture, out=mixture).add_(math.log(beta))
    slope = _terms(s, mixture, into=torch.empty_like(s)).mul_(1 - beta)
    terms = _terms(t, mixture, into=mixture).mul_(beta).add_(slope)
    if factor != 1:
        terms.mul_(factor)
        slope.mul_(factor)
    return terms, slope, s


def _buckets(
    spec: Divergence, student: Tensor, teacher: Tensor, ids: Tensor, grad: Tensor | None
) -> tuple[Told, Kept]:
    """What `_block` says with all but K entries poured into one."""
    assert spec.top_k is not None
    dtype = torch.promote_types(student.dtype, torch.float32)
    s, t = (x.to(dtype, copy=True) for x in (student, teacher))
    if spec.temperature != 1:
        s, t = s.div_(spec.temperature), t.div_(spec.temperature)
    index = largest(s if spec.top_k_from == "student" else t, spec.top_k)
    bins, logp, shares, log_tail = _pour(s, index, ids)
    teacher_bins, teacher_logp, _, _ = _pour(t, index, ids)
    loss, clipped, slope, mass = _entries(spec, bins, teacher_bins)
    slope = slope.addcmul_(mass, slope.sum(-1, keepdim=True), value=-1)
    if grad is not None:
        torch.mul(shares, slope[..., -1:], out=grad)
        grad.scatter_(-1, index, slope[..., :-1].to(grad.dtype))
    return (loss, clipped, logp, teacher_logp), (index, log_tail, slope)


def largest(rows: Tensor, k: int) -> Tensor:
    """Places [N, K] of the K largest entries of each row [N, V], in any order.

    A processor's `torch.topk` writes down a pair for every entry. The K largest lie in the K groups
    whose own largest are largest, so that of many entries only these are searched: a third of the time
    at 151,936. Which of several equal ones is taken is as open as with `torch.topk`.
    """
    entries = rows.shape[-1]
    groups = entries // GROUP
    if not rows.is_cpu or groups < 2 * k:
        return rows.topk(k, dim=-1, sorted=False).indices
    split = groups * GROUP  # group j is every entry j + i * groups: maxima of whole lines are fast
    best = rows[:, :split].unflatten(-1, (GROUP, groups)).amax(-2).topk(k, sorted=False).indices
    lines = torch.arange(0, split, groups)[:, None]
    searched = (best[:, None, :] + lines).flatten(1)
    if split < entries:
        rest = torch.arange(split, entries).expand(len(rows), -1)
        searched = torch.cat([searched, rest], dim=1)
    found = rows.gather(-1, searched).topk(k, sorted=False).indices
    return searched.gather(-1, found)


def _pour(logits: Tensor, index: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities of the kept entries and the tail, log p(id), each entry's part of the tail, and
    the log-sum-exp of the tail's logits.

    The kept entries are -inf in ``logits`` afterwards. An empty tail has nothing to share.
    """
    own, kept = logits.gather(-1, ids)[..., 0], logits.gather(-1, index)
    highest = logits.scatter_(-1, index, -math.inf).amax(-1, keepdim=True)
    empty = highest == -math.inf
    # A softmax is half the work of a log-sum-exp and an exp, and its largest entry knows the sum.
    shares = logits.softmax(-1)
    if not empty.is_cpu or empty.any():  # another device is not waited for to know it
        shares.masked_fill_(empty, 0.0)
    tail = torch.where(empty, highest, highest - shares.amax(-1, keepdim=True).log())
    bins = torch.cat([kept, tail], dim=-1)
    log_sum = bins.logsumexp(-1, keepdim=True)
    return bins - log_sum, own - log_sum[..., 0], shares, tail[..., 0]


class FusedRows(torch.autograd.Function):
    """`of_rows` by Triton kernels, which make the gradient when it is asked for."""

    @staticmethod
    def forward(
        ctx: Any, student_logits: Tensor, teacher_logits: Tensor, ids: Tensor, spec: Divergence,
        donate_teacher_logits: bool,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """Values; of a few numbers per row the gradient can be made later, from logits nobody spent."""
        entries = student_logits.shape[-1]
        student_NV, teacher_NV = (x.reshape(-1, entries) for x in (student_logits, teacher_logits))
        of = _fused_buckets if spec.has_tail(entries) else _fused_entries
        told, kept = of(spec, student_NV, teacher_NV, ids.reshape(-1))
        ctx.spec, ctx.shape = spec, student_logits.shape
        ctx.save_for_backward(student_NV, teacher_NV, *kept)
        loss, clipped, logp, teacher_logp = (x.reshape(ids.shape) for x in told)
        ctx.mark_non_differentiable(clipped, logp, teacher_logp)
        ctx.set_materialize_grads(False)
        return loss, clipped, logp, teacher_logp

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_loss: Tensor | None, *_: None
    ) -> tuple[Tensor | None, None, None, None, None]:
        """The gradient times what each row's loss counts for, in the logits' dtype."""
        if grad_loss is None or not ctx.needs_input_grad[0]:
            return None, None, None, None, None
        student_NV, teacher_NV, *kept = ctx.saved_tensors
        tail = ctx.spec.has_tail(student_NV.shape[1])
        of = _buckets_gradient if tail else _entries_gradient
        grad_NV = of(ctx.spec, student_NV, teacher_NV, grad_loss.reshape(-1), *kept)
        return grad_NV.reshape(ctx.shape), None, None, None, None


def _fused_entries(
    spec: Divergence, student: Tensor, teacher: Tensor, ids: Tensor
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """What `of_rows` says of each row, and what `_entries_gradient` wants to know."""
    own, others = (row_kernels.row_sums(x, ids, spec.temperature) for x in (student, teacher))
    sides = row_kernels.Sides(student, teacher, own.log_sum_N, others.log_sum_N)
    told = row_kernels.losses(
        sides, spec.kind, spec.beta, spec.jsd_factor, spec.clip, spec.temperature
    )
    said = (told.loss_N, told.clipped_N, own.logp_N, others.logp_N)
    return said, (own.log_sum_N, others.log_sum_N, told.slope_sum_N)


def _entries_gradient(
    spec: Divergence, student: Tensor, teacher: Tensor, grad_loss: Tensor,
    log_sum: Tensor, teacher_log_sum: Tensor, slope_sum: Tensor,
) -> Tensor:  # fmt: skip
    sides = row_kernels.Sides(student, teacher, log_sum, teacher_log_sum)
    return row_kernels.loss_gradient(
        sides, slope_sum, grad_loss, spec.kind, spec.beta, spec.jsd_factor, spec.clip,
        spec.temperature,
    )  # fmt: skip


def _fused_buckets(
    spec: Divergence, student: Tensor, teacher: Tensor, ids: Tensor
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """`_fused_entries` with all but K entries poured into one; a byte per entry marks the K."""
    assert spec.top_k is not None
    index = (student if spec.top_k_from == "student" else teacher).topk(spec.top_k).indices
    kept = torch.zeros(student.shape, dtype=torch.uint8, device=student.device)
    kept.scatter_(-1, index, 1)
    sides = [row_kernels.row_sums(x, ids, spec.temperature, kept) for x in (student, teacher)]
    logs = []
    for logits, sums in zip((student, teacher), sides, strict=True):
        assert sums.log_tail_N is not None
        few = logits.gather(-1, index).to(sums.log_sum_N.dtype) / spec.temperature
        bins = torch.cat([few, sums.log_tail_N[:, None]], dim=-1)
        logs.append(bins - sums.log_sum_N[:, None])
    loss, clipped, slope, mass = _entries(spec, *logs)
    slope = slope - mass * slope.sum(-1, keepdim=True)
    said = (loss, clipped, sides[0].logp_N, sides[1].logp_N)
    return said, (index, sides[0].log_tail_N, slope)  # pyright: ignore[reportReturnType]


def _buckets_gradient(
    spec: Divergence, student: Tensor, _teacher: Tensor, grad_loss: Tensor,
    index: Tensor, log_tail: Tensor, slope: Tensor,
) -> Tensor:  # fmt: skip
    slope = slope * (grad_loss[:, None] / spec.temperature)
    grad = row_kernels.tail_gradient(student, log_tail, slope[:, -1], spec.temperature)
    return grad.scatter_(-1, index, slope[:, :-1].to(grad.dtype))
