"""A sum of divergences straight from hidden states, on a GPU: no chunk of logits, no sum of its own
for a head's gradient.

`scores.chunked_sum` walks tokens and holds a chunk's logits; a head that trains in half precision
then needs a float32 sum of its size. Here all tokens are walked together, a slab of the vocabulary at
a time, so that a slab's rows of the head's gradient are written once and whole. See
`linear_kernels` for what computes logits where.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor

from selfteach.losses.divergence_spec import Divergence
from selfteach.losses.kernels import linear_kernels
from selfteach.losses.kernels.linear_kernels import Sides
from selfteach.models import matmul
from selfteach.models.lm_head import Scores, WithGradients, is_plain, wanted


def supports(spec: Divergence, student: Scores, teacher: Scores) -> bool:
    """True where `divergence_sum` can: one plain head a side, halves, every entry its own term."""
    if spec.support == "sampled" or not (is_plain(student) and is_plain(teacher)):
        return False
    for hidden_NH, _, _ in (*student.terms, *teacher.terms):
        if not (len(hidden_NH) and linear_kernels.runs(hidden_NH)):
            return False
    return not spec.has_tail(len(student.terms[0][1].weight_VH)) and spec.temperature == 1


def divergence_sum(
    spec: Divergence,
    student: Scores,
    teacher: Scores,
    ids_N: Int[Tensor, " N"],
    weight_N: Float[Tensor, " N"],
    factor: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Float[Tensor, ""], Mapping[str, Float[Tensor, " N"]]]:
    """Sum weight times divergence over all rows, as `scores.chunked_sum` does, for what `runs` allows.

    Returns the sum and, detached, per row its ``loss``, the ``clipped`` share of its entries, and
    ``logp`` and ``teacher_logp`` of its id. ``factor`` makes of the ids' log-probabilities what each
    row's weight is multiplied by, a constant. Rows of weight 0 are as if absent from sum and gradients.

    Peak workspace: `linear_kernels.SLAB_BYTES` for a slab of the logits' gradient, [N, H] in float32
    and once more in the hidden states' dtype, and a copy of each head [V, H] whose dtype is not theirs.
    """
    ((hidden_NH, head, _),), ((teacher_NH, teacher_head, _),) = student.terms, teacher.terms
    both = (
        hidden_NH, head.weight_VH.to(hidden_NH.dtype),
        teacher_NH, teacher_head.weight_VH.to(teacher_NH.dtype),
    )  # fmt: skip
    sides = Sides(*(x.detach().contiguous() for x in both))
    own = linear_kernels.sums(sides, ids_N, spec.kind)
    told = linear_kernels.losses(sides, own, spec.kind, spec.beta, spec.jsd_factor, spec.clip)
    scale_N = weight_N.detach().float()
    if factor is not None:
        scale_N = scale_N * factor(own.logp_N)
    absent_N = weight_N == 0
    scale_N = scale_N.masked_fill(absent_N, 0.0)
    total = (scale_N * told.loss_N).masked_fill(absent_N, 0.0).sum()
    sources = (hidden_NH, head.weight_VH, None)
    grads = _gradients(spec, sides, own, told.slope_sum_N, scale_N, absent_N, sources)
    said = {
        "loss": told.loss_N, "clipped": told.clipped_N, "logp": own.logp_N,
        "teacher_logp": own.teacher_logp_N,
    }  # fmt: skip
    return WithGradients.apply(total, *grads, *sources), said  # type: ignore[return-value]


def _gradients(
    spec: Divergence, sides: Sides, own: linear_kernels.Sums, slope_sum_N: Tensor, scale_N: Tensor,
    absent_N: Tensor, sources: tuple[Tensor, Tensor, None],
) -> tuple[Tensor | None, Tensor | None, None]:  # fmt: skip
    """The sum's gradients in hidden states (float32) and head (its own dtype) that want one."""
    hidden_NH, head_VH, _ = sources
    grad_NH = torch.zeros_like(hidden_NH, dtype=torch.float32) if wanted(hidden_NH) else None
    grad_VH = torch.empty_like(head_VH) if wanted(head_VH) else None
    if grad_NH is None and grad_VH is None:
        return None, None, None
    live_NH = sides.student_NH.masked_fill(absent_N[:, None], 0.0)  # 0 times NaN is NaN
    N, V = len(hidden_NH), len(head_VH)
    entries = linear_kernels.SLAB_BYTES // (N * hidden_NH.element_size())
    width = min(
        V, max(1, entries // linear_kernels.GRADIENT.entries) * linear_kernels.GRADIENT.entries
    )
    memory = hidden_NH.new_empty(N * width)
    for first in range(0, V, width):
        part = slice(first, min(first + width, V))
        grad_NW = memory[: N * (part.stop - first)].view(N, -1)
        linear_kernels.slab(
            sides, own, slope_sum_N, scale_N, grad_NW, first,
            spec.kind, spec.beta, spec.jsd_factor, spec.clip,
        )  # fmt: skip
        if grad_NH is not None:
            matmul.add(grad_NH, grad_NW, sides.student_VH[part])
        if grad_VH is not None:
            matmul.write(grad_VH[part], grad_NW.T, live_NH)
    return grad_NH, grad_VH, None
