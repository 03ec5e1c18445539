"""Compute logits on demand, and sum losses chunk by chunk without ever holding all logits.

A full [N, V] of float32 logits for 16 rollouts of 2,048 tokens over 150,000 entries is 20 GB, and a
loss needs several of them. Here the N rows are processed in chunks of C, and each chunk's gradient is
computed in the same pass, so that logits are computed once per row and dropped.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from selfteach.models import matmul


@dataclass(frozen=True, slots=True)
class Head:
    """Maps a model's hidden states to logits.

    ``softcap * tanh(x / softcap)`` of ``x = scale (h Wᵀ + b)``; the cap only where one is set.
    The matmul runs in the hidden state's dtype (weight and bias are cast to it; but see
    `matmul.linear` for bf16/fp16), scale and cap in float32 at least. Logits with neither keep the
    matmul's dtype: their readers compute in float32 anyway, and a copy of them all would be the
    largest tensor in memory.
    """

    weight_VH: Float[Tensor, "V H"]
    bias_V: Float[Tensor, " V"] | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: Float[Tensor, "*rows H"]) -> Float[Tensor, "*rows V"]:
        """Compute logits of each row, differentiable in hidden, weight and bias."""
        return self.finish(self.project(hidden))

    def project(self, hidden: Float[Tensor, "*rows H"]) -> Float[Tensor, "*rows V"]:
        """Compute ``h Wᵀ + b`` in the dtype of ``hidden``; see `matmul.linear` for bf16/fp16."""
        bias_V = None if self.bias_V is None else matmul.cast_weight(self.bias_V, hidden)
        return matmul.linear(hidden, matmul.cast_weight(self.weight_VH, hidden), bias_V)

    def finish(self, projection: Float[Tensor, "*rows V"]) -> Float[Tensor, "*rows V"]:
        """Apply scale and soft cap, in float32 at least, where there are any."""
        if self.scale == 1.0 and self.softcap is None:
            return projection
        logits = projection.to(torch.promote_types(projection.dtype, torch.float32))
        if self.scale != 1.0:
            logits = self.scale * logits
        if self.softcap is None:
            return logits
        return self.softcap * torch.tanh(logits / self.softcap)


Term = tuple[Float[Tensor, "N _"], Head, float]
"""Hidden states, their head, and the weight of its logits in the mixture."""


@dataclass(frozen=True, slots=True)
class Scores:
    """Computes the logits of N rows on demand: a weighted sum over models, in logit space.

    Example (a trust-region teacher, 0.9 of the initial and 0.1 of the current policy)::

        Scores(((initial_NH, head, 0.9), (live_NH, head, 0.1)))
    """

    terms: tuple[Term, ...]

    @classmethod
    def single(cls, hidden_NH: Float[Tensor, "N H"], head: Head) -> Scores:
        """Return the scores of one model."""
        return cls(((hidden_NH, head, 1.0),))

    def logits(self, rows: slice) -> Float[Tensor, "C V"]:
        """Compute the logits of some rows; those of a mixture in float32 at least."""
        terms = (_share(mix, head.logits(hidden_NH[rows])) for hidden_NH, head, mix in self.terms)
        return functools.reduce(torch.add, terms)


def is_plain(scores: Scores) -> bool:
    """Return True for the logits ``h Wᵀ`` of one model, without bias, scale or soft cap."""
    ((_, head, mix), *more) = scores.terms
    return not more and head.bias_V is None and head.scale == mix == 1.0 and head.softcap is None


def _share(mix: float, logits: Tensor) -> Tensor:
    if mix == 1.0:
        return logits
    return mix * logits.to(torch.promote_types(logits.dtype, torch.float32))


PerTokenFn = Callable[[Tensor, slice], Mapping[str, Tensor]]
"""Maps one chunk's logits [C, V] and its rows to named values [C], ``"loss"`` among them."""


def chunked_sum(
    fn: PerTokenFn, student: Scores, weight_N: Float[Tensor, " N"], *, chunk_tokens: int
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """Sum weight times loss over all rows without holding their logits.

    Returns the sum, whose gradient reaches the student's hidden states, head weight and head bias
    as far as these require one, and what ``fn`` returned for each row, detached, in row order (empty
    for N = 0). The sum has the gradient of the plain computation, whatever ``chunk_tokens``;
    it can be differentiated once. ``fn`` must depend on nothing else that needs a gradient, and
    must treat rows independently. Outside grad mode only values are computed.

    A row of weight 0 is as if it were absent from the sum and from every gradient, even where its
    hidden state, its loss or its teacher is not finite; its statistics are still reported.

    Peak workspace: a few [C, V] (the logits, what ``fn`` saves for its gradient, and that gradient),
    the [N, H] gradient, a copy of the head if its dtype is not that of the hidden states, and for a
    trainable head one [V, H] accumulator, in float32 or better, which becomes its gradient. Nothing is
    of size [N, V].

    Raises ValueError when ``student`` mixes several terms, there is not one weight per row,
    ``chunk_tokens`` is below 1, or ``fn`` returns a loss that is not one number per row.
    """
    _check(student, weight_N, chunk_tokens)
    ((hidden_NH, head, mix),) = student.terms
    sources = (hidden_NH, head.weight_VH, head.bias_V)
    grads = [
        _zeros_for(x, added=x is not hidden_NH) if x is not None and needs_gradient(x) else None
        for x in sources
    ]
    constant = (hidden_NH.detach(), _detached(head, hidden_NH), mix)
    stats: dict[str, list[Tensor]] = {}
    total = hidden_NH.new_zeros((), dtype=torch.promote_types(hidden_NH.dtype, torch.float32))
    for start in range(0, max(1, len(hidden_NH)), chunk_tokens):  # no rows are one empty chunk
        rows = slice(start, min(start + chunk_tokens, len(hidden_NH)))
        chunk_total, values = _chunk(fn, constant, weight_N.detach(), rows, grads)
        total += chunk_total
        for name, value_C in values.items():
            stats.setdefault(name, []).append(value_C)
    joined = {name: torch.cat(values) for name, values in stats.items()}
    return WithGradients.apply(total, *grads, *sources), joined  # type: ignore[return-value]


def _check(student: Scores, weight_N: Tensor, chunk_tokens: int) -> None:
    if len(student.terms) != 1:
        raise ValueError(f"the student must be one model, got {len(student.terms)} terms")
    rows = len(student.terms[0][0])
    if len(weight_N) != rows:
        raise ValueError(f"{len(weight_N)} weights for {rows} rows")
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1, got {chunk_tokens}")


@torch.no_grad()
def _detached(head: Head, hidden_NH: Tensor) -> Head:
    """Return the head outside the graph and in the matmul's dtype: cast once, not once per chunk."""
    bias_V = None if head.bias_V is None else matmul.cast_weight(head.bias_V.detach(), hidden_NH)
    weight_VH = matmul.cast_weight(head.weight_VH.detach(), hidden_NH)
    return replace(head, weight_VH=weight_VH, bias_V=bias_V)


def needs_gradient(source: Tensor) -> bool:
    """Return True where a gradient must be computed for a tensor."""
    return torch.is_grad_enabled() and source.requires_grad


def _zeros_for(source: Tensor, *, added: bool) -> Tensor:
    """Return zeros like a source: in float32 at least where chunks are added up."""
    dtype = torch.promote_types(source.dtype, torch.float32) if added else source.dtype
    return torch.zeros_like(source, dtype=dtype)


def _chunk(
    fn: PerTokenFn, term: Term, weight_N: Tensor, rows: slice, grads: list[Tensor | None]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute one chunk's sum and ``fn``'s values; adds the chunk's gradients to ``grads``."""
    hidden_NH, head, mix = term
    hidden_CH, weight_C = hidden_NH[rows], weight_N[rows]
    absent_C = weight_C == 0
    some_absent = not absent_C.is_cpu or bool(absent_C.any())  # no synchronisation with a GPU
    needs_grad = any(grad is not None for grad in grads)
    with torch.no_grad():
        projection_CV = head.project(hidden_CH)
    with torch.set_grad_enabled(needs_grad):
        values = fn(_share(mix, head.finish(projection_CV.requires_grad_(needs_grad))), rows)
        loss_C = values["loss"]
        if loss_C.shape != weight_C.shape:
            raise ValueError(f"loss of shape {tuple(loss_C.shape)} for {len(weight_C)} rows")
        total = (weight_C * loss_C).masked_fill(absent_C, 0.0).sum()
    if needs_grad:
        (grad_CV,) = torch.autograd.grad(total, projection_CV)
        if some_absent:
            # Zero times NaN is NaN: rows must be zeroed on both sides of the matmuls.
            fill = Tensor.masked_fill_ if grad_CV.is_contiguous() else Tensor.masked_fill
            grad_CV = fill(grad_CV, absent_C[:, None], 0.0)
            hidden_CH = hidden_CH.masked_fill(absent_C[:, None], 0.0)
        del projection_CV
        _add_gradients(head, hidden_CH, matmul.cast_gradient(grad_CV, hidden_CH), rows, grads)
    # Detached here, so that the next chunk does not overlap with this one's graph.
    return total.detach(), {name: value_C.detach() for name, value_C in values.items()}


def _add_gradients(
    head: Head, hidden_CH: Tensor, grad_CV: Tensor, rows: slice, grads: list[Tensor | None]
) -> None:
    """Add the backward of `Head.project` in place to the accumulators that exist."""
    grad_NH, grad_VH, grad_V = grads
    if grad_NH is not None:
        grad_NH[rows] = matmul.mm(grad_CV, head.weight_VH)
    if grad_VH is not None:
        matmul.addmm_into(grad_VH, grad_CV.T, hidden_CH)
    if grad_V is not None:
        grad_V += grad_CV.sum(0)


class WithGradients(torch.autograd.Function):
    """Attaches precomputed gradients with respect to three sources to a scalar.

    On a GPU they are scaled in place, so that it can be differentiated once only.
    """

    @staticmethod
    def forward(ctx: Any, total: Tensor, *grads_and_sources: Tensor | None) -> Tensor:
        """Return the total; saves the three gradients, which come before their sources."""
        ctx.save_for_backward(*grads_and_sources[:3])
        ctx.differentiated = False
        return total.clone()

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        """Return the saved gradients times the total's gradient."""
        (grad_total,) = grad_outputs
        # Times one, as nearly always, they are returned without a second [V, H]; a GPU is not
        # synchronised to find out. Autograd casts each to its source's dtype.
        if grad_total.is_cpu and grad_total.item() == 1:
            return (None, None, None, None, *ctx.saved_tensors)
        if grad_total.is_cpu:
            scaled = (None if grad is None else grad_total * grad for grad in ctx.saved_tensors)
            return (None, None, None, None, *scaled)
        if ctx.differentiated:
            raise RuntimeError("on a GPU a sum with gradients can be differentiated once only")
        ctx.differentiated = True
        grads = (None if grad is None else grad.mul_(grad_total) for grad in ctx.saved_tensors)
        return (None, None, None, None, *grads)
