"""Logits that are never all there at once: output heads, and losses summed chunk by chunk.

A full [N, V] of float32 logits for 16 answers of 2,048 tokens over 150,000 entries is 20 GB, and a
loss wants several of them. Here the N rows are walked in chunks of C, and each chunk's gradient is
taken in the same pass, so that the head is computed once per row and forgotten.
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
    """A model's map from hidden states to logits.

    ``softcap * tanh(x / softcap)`` of ``x = scale (h Wᵀ + b)``; the cap only where one is set.
    The product runs in the hidden state's dtype (weight and bias are cast to it; but see
    `products.linear` for halves), scale and cap in float32 at least. Logits of neither stay in the
    product's dtype: who reads them computes in float32 anyway, and a copy of them all would be the
    largest thing in memory.
    """

    weight_VH: Float[Tensor, "V H"]
    bias_V: Float[Tensor, " V"] | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: Float[Tensor, "*rows H"]) -> Float[Tensor, "*rows V"]:
        """Logits of each row, differentiable in hidden, weight and bias."""
        return self.finish(self.product(hidden))

    def product(self, hidden: Float[Tensor, "*rows H"]) -> Float[Tensor, "*rows V"]:
        """``h Wᵀ + b`` in the dtype of ``hidden``; see `products.linear` for halves."""
        bias_V = None if self.bias_V is None else matmul.suited(self.bias_V, hidden)
        return matmul.linear(hidden, matmul.suited(self.weight_VH, hidden), bias_V)

    def finish(self, product: Float[Tensor, "*rows V"]) -> Float[Tensor, "*rows V"]:
        """Scale and soft cap, in float32 at least, where there are any."""
        if self.scale == 1.0 and self.softcap is None:
            return product
        logits = product.to(torch.promote_types(product.dtype, torch.float32))
        if self.scale != 1.0:
            logits = self.scale * logits
        if self.softcap is None:
            return logits
        return self.softcap * torch.tanh(logits / self.softcap)


Term = tuple[Float[Tensor, "N _"], Head, float]
"""Hidden states, the head they belong to, and the share of its logits in the mixture."""


@dataclass(frozen=True, slots=True)
class Scores:
    """Logits of N rows, made on demand: a weighted sum over models, in logit space.

    Example (a trust-region teacher, nine parts initial policy and one part live policy)::

        Scores(((initial_NH, head, 0.9), (live_NH, head, 0.1)))
    """

    terms: tuple[Term, ...]

    @classmethod
    def single(cls, hidden_NH: Float[Tensor, "N H"], head: Head) -> Scores:
        """The logits of one model."""
        return cls(((hidden_NH, head, 1.0),))

    def logits(self, rows: slice) -> Float[Tensor, "C V"]:
        """The logits of some rows; those of a mixture in float32 at least."""
        parts = (_share(mix, head.logits(hidden_NH[rows])) for hidden_NH, head, mix in self.terms)
        return functools.reduce(torch.add, parts)


def is_plain(scores: Scores) -> bool:
    """True for the logits ``h Wᵀ`` of one model, and nothing else."""
    ((_, head, mix), *more) = scores.terms
    return not more and head.bias_V is None and head.scale == mix == 1.0 and head.softcap is None


def _share(mix: float, logits: Tensor) -> Tensor:
    if mix == 1.0:
        return logits
    return mix * logits.to(torch.promote_types(logits.dtype, torch.float32))


PerTokenFn = Callable[[Tensor, slice], Mapping[str, Tensor]]
"""From one chunk's logits [C, V] and its rows to named values [C], ``"loss"`` among them."""


def chunked_sum(
    fn: PerTokenFn, student: Scores, weight_N: Float[Tensor, " N"], *, chunk_tokens: int
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """Sum weight times loss over all rows without holding their logits.

    Returns the sum, whose gradient reaches the student's hidden states, head weight and head bias
    as far as these require one, and what ``fn`` said of each row, detached, in row order (of no
    row for N = 0). The sum has the gradient of the plain computation, whatever ``chunk_tokens``;
    it can be differentiated once. ``fn`` must depend on nothing else that needs a gradient, and
    must treat rows independently. Outside grad mode nothing but the values is computed.

    A row of weight 0 is as if it were absent from the sum and from every gradient, even where its
    hidden state, its loss or its teacher is not finite; its statistics are still reported.

    Peak workspace: a few [C, V] (the logits, what ``fn`` keeps for its gradient, and that gradient),
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
        _zeros_for(x, added=x is not hidden_NH) if x is not None and wanted(x) else None
        for x in sources
    ]
    constant = (hidden_NH.detach(), _constant(head, hidden_NH), mix)
    stats: dict[str, list[Tensor]] = {}
    total = hidden_NH.new_zeros((), dtype=torch.promote_types(hidden_NH.dtype, torch.float32))
    for start in range(0, max(1, len(hidden_NH)), chunk_tokens):  # no rows are one empty chunk
        rows = slice(start, min(start + chunk_tokens, len(hidden_NH)))
        part, said = _chunk(fn, constant, weight_N.detach(), rows, grads)
        total += part
        for name, value_C in said.items():
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
def _constant(head: Head, hidden_NH: Tensor) -> Head:
    """The head outside the graph and in the product's dtype: cast once, not once per chunk."""
    bias_V = None if head.bias_V is None else matmul.suited(head.bias_V.detach(), hidden_NH)
    weight_VH = matmul.suited(head.weight_VH.detach(), hidden_NH)
    return replace(head, weight_VH=weight_VH, bias_V=bias_V)


def wanted(source: Tensor) -> bool:
    """True where a gradient is to be computed for it."""
    return torch.is_grad_enabled() and source.requires_grad


def _zeros_for(source: Tensor, *, added: bool) -> Tensor:
    """A gradient to fill: in float32 at least where chunks are added up, else in the source's dtype."""
    dtype = torch.promote_types(source.dtype, torch.float32) if added else source.dtype
    return torch.zeros_like(source, dtype=dtype)


def _chunk(
    fn: PerTokenFn, term: Term, weight_N: Tensor, rows: slice, grads: list[Tensor | None]
) -> tuple[Tensor, dict[str, Tensor]]:
    """One chunk's part of the sum and ``fn``'s values; adds the chunk's gradients to ``grads``."""
    hidden_NH, head, mix = term
    hidden_CH, weight_C = hidden_NH[rows], weight_N[rows]
    absent_C = weight_C == 0
    some_absent = not absent_C.is_cpu or bool(absent_C.any())  # another device is not waited for
    needs_grad = any(grad is not None for grad in grads)
    with torch.no_grad():
        product_CV = head.product(hidden_CH)
    with torch.set_grad_enabled(needs_grad):
        said = fn(_share(mix, head.finish(product_CV.requires_grad_(needs_grad))), rows)
        loss_C = said["loss"]
        if loss_C.shape != weight_C.shape:
            raise ValueError(f"loss of shape {tuple(loss_C.shape)} for {len(weight_C)} rows")
        part = (weight_C * loss_C).masked_fill(absent_C, 0.0).sum()
    if needs_grad:
        (grad_CV,) = torch.autograd.grad(part, product_CV)
        if some_absent:
            # Zero times NaN is NaN: the rows must be emptied on both sides of the products.
            empty = Tensor.masked_fill_ if grad_CV.is_contiguous() else Tensor.masked_fill
            grad_CV = empty(grad_CV, absent_C[:, None], 0.0)
            hidden_CH = hidden_CH.masked_fill(absent_C[:, None], 0.0)
        del product_CV
        _add_gradients(head, hidden_CH, matmul.narrowed(grad_CV, hidden_CH), rows, grads)
    # Detached here, so that the next chunk does not overlap with this one's graph.
    return part.detach(), {name: value_C.detach() for name, value_C in said.items()}


def _add_gradients(
    head: Head, hidden_CH: Tensor, grad_CV: Tensor, rows: slice, grads: list[Tensor | None]
) -> None:
    """The backward of ``Head.product``, added in place to the accumulators that exist."""
    grad_NH, grad_VH, grad_V = grads
    if grad_NH is not None:
        grad_NH[rows] = matmul.times(grad_CV, head.weight_VH)
    if grad_VH is not None:
        matmul.add(grad_VH, grad_CV.T, hidden_CH)
    if grad_V is not None:
        grad_V += grad_CV.sum(0)


class WithGradients(torch.autograd.Function):
    """A scalar whose gradients with respect to three sources are already known.

    On a GPU they are scaled where they lie, so that it can be differentiated once only.
    """

    @staticmethod
    def forward(ctx: Any, total: Tensor, *grads_and_sources: Tensor | None) -> Tensor:
        """The total; keeps the three gradients that come first."""
        ctx.save_for_backward(*grads_and_sources[:3])
        ctx.spent = False
        return total.clone()

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        """The kept gradients times the total's."""
        (grad_total,) = grad_outputs
        # Times one, as nearly always, they are handed on without a second [V, H]; another device is
        # not waited for to know it. Autograd casts each to its source's dtype.
        if grad_total.is_cpu and grad_total.item() == 1:
            return (None, None, None, None, *ctx.saved_tensors)
        if grad_total.is_cpu:
            scaled = (None if grad is None else grad_total * grad for grad in ctx.saved_tensors)
            return (None, None, None, None, *scaled)
        if ctx.spent:
            raise RuntimeError("on a GPU a sum with gradients can be differentiated once only")
        ctx.spent = True
        grads = (None if grad is None else grad.mul_(grad_total) for grad in ctx.saved_tensors)
        return (None, None, None, None, *grads)
