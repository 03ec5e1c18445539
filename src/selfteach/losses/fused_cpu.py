"""A sum of divergences whose head trains in half precision, on a processor: no float32 sum of its size.

`scores.chunked_sum` walks tokens, and every chunk adds to a float32 sum as large as the head: of a wide
model that is most of the memory, and half of the time. Here the walk over tokens keeps a few numbers of
each row, from which its gradient is made again for a slab of the vocabulary and all rows at once: a
slab's rows of the head's gradient are one product, written once. It costs the logits a second time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor

from selfteach.losses import analytic_gradients
from selfteach.losses.analytic_gradients import Kept, Told
from selfteach.losses.divergence_spec import Divergence
from selfteach.models import matmul
from selfteach.models.lm_head import Scores, WithGradients, is_plain, wanted

WIDE = 1024
"""Width of hidden states from which a float32 sum costs more than the logits once more: at 2,048 it
took half of the time; at 576 slabs take a fifth more, and the sum stays."""
SLAB_ENTRIES = 2**21
"""Logits of a slab: 4 MiB of either side's, and as much of their gradient."""


def runs(spec: Divergence, student: Scores, teacher: Scores) -> bool:
    """True where `divergence_sum` can, and saves something."""
    weight_VH = student.terms[0][1].weight_VH
    if weight_VH.shape[1] < WIDE:
        return False
    own, others = (x.terms[0][0].dtype for x in (student, teacher))
    halves = own == others and own in matmul.HALVES
    trains = wanted(weight_VH) and weight_VH.is_cpu and weight_VH.dtype in matmul.HALVES
    return is_plain(student) and is_plain(teacher) and halves and trains and spec.temperature == 1


def divergence_sum(
    spec: Divergence,
    student: Scores,
    teacher: Scores,
    ids_N: Int[Tensor, " N"],
    weight_N: Float[Tensor, " N"],
    factor: Callable[[Tensor], Tensor] | None = None,
    *,
    chunk_tokens: int,
) -> tuple[Float[Tensor, ""], Mapping[str, Float[Tensor, " N"]]]:
    """As `fused.divergence_sum` in arguments, values and gradients, for what `runs` allows; tokens are
    walked ``chunk_tokens`` at a time. Top-K too.

    Peak workspace: both sides' [C, V] for chunks of C tokens, or three times `SLAB_ENTRIES`; [N, H] in
    float32 and once more in the hidden states' dtype; and a copy of a teacher's head of another dtype.
    """
    ((hidden_NH, head, _),), ((teacher_NH, teacher_head, _),) = student.terms, teacher.terms
    student_NH, student_VH, teacher_NH = (
        x.detach() for x in (hidden_NH, head.weight_VH, teacher_NH)
    )
    with torch.no_grad():
        teacher_VH = matmul.suited(teacher_head.weight_VH, teacher_NH)
    absent_N = weight_N == 0
    grad_NH = torch.zeros_like(student_NH, dtype=torch.float32) if wanted(hidden_NH) else None
    told, kept = list[Told](), list[Kept]()

    def of_chunk(rows: slice) -> None:
        student_CV = matmul.linear(student_NH[rows], student_VH, None)
        teacher_CV = matmul.linear(teacher_NH[rows], teacher_VH, None)
        grad_CV = teacher_CV if grad_NH is not None else None  # nobody reads their logits again
        said, own = analytic_gradients.walked(
            spec, student_CV, teacher_CV, ids_N[rows, None], grad_CV
        )
        if grad_NH is not None:
            grad_NH[rows] = matmul.times(teacher_CV, student_VH)
        told.append(said)
        kept.append(own)

    with torch.no_grad():
        for start in range(0, max(1, len(ids_N)), chunk_tokens):
            of_chunk(slice(start, min(start + chunk_tokens, len(ids_N))))
        loss_N, clipped_N, logp_N, teacher_logp_N = map(torch.cat, zip(*told, strict=True))
        known = tuple(map(torch.cat, zip(*kept, strict=True)))
        scale_N = weight_N.detach().float()
        if factor is not None:
            scale_N = scale_N * factor(logp_N)
        scale_N = scale_N.masked_fill(absent_N, 0.0)
        total = (scale_N * loss_N).masked_fill(absent_N, 0.0).sum()
        if grad_NH is not None:
            grad_NH.mul_(scale_N[:, None]).masked_fill_(absent_N[:, None], 0.0)
        teacher_side = (teacher_NH, teacher_VH) if not spec.has_tail(len(student_VH)) else None
        grad_VH = _head(spec, (student_NH, student_VH), teacher_side, known, scale_N, absent_N)
    sources = (hidden_NH, head.weight_VH, None)
    said = {"loss": loss_N, "clipped": clipped_N, "logp": logp_N, "teacher_logp": teacher_logp_N}
    return WithGradients.apply(total, grad_NH, grad_VH, None, *sources), said  # type: ignore[return-value]


def _head(
    spec: Divergence, student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor] | None, kept: Kept,
    scale_N: Tensor, absent_N: Tensor,
) -> Tensor:  # fmt: skip
    """The head's gradient, slab by slab."""
    hidden_NH, weight_VH = student
    live_NH = hidden_NH.masked_fill(absent_N[:, None], 0.0)  # 0 times NaN is NaN
    grad_VH = torch.empty_like(weight_VH)
    width = max(1, SLAB_ENTRIES // max(1, len(hidden_NH)))
    for first in range(0, len(weight_VH), width):
        part = slice(first, min(first + width, len(weight_VH)))
        student_NW = matmul.linear(hidden_NH, weight_VH[part], None)
        teacher_NW = matmul.linear(teacher[0], teacher[1][part], None) if teacher else None
        grad_NW = torch.empty_like(student_NW)
        analytic_gradients.gradient_of_slab(
            spec, student_NW, teacher_NW, kept, first, scale_N, grad_NW
        )
        grad_NW.masked_fill_(absent_N[:, None], 0.0)
        matmul.write(grad_VH[part], grad_NW.T, live_NH)
    return grad_VH
