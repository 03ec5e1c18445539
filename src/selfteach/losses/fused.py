"""Sum divergences straight from hidden states on a GPU, without a chunk of logits in memory.

`lm_head.chunked_sum` iterates over tokens and holds a chunk's logits; a bf16/fp16 head that trains then
needs a float32 accumulator of its size. Here all tokens are processed together, a block of the
vocabulary at a time, so that a block's rows of the head's gradient are written once and complete. See
`linear_kernels` for what computes logits where.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor

from selfteach.losses.divergence_spec import Divergence
from selfteach.losses.kernels import linear_kernels
from selfteach.losses.kernels.linear_kernels import LinearSides
from selfteach.models import matmul
from selfteach.models.lm_head import Scores, WithGradients, is_plain, needs_gradient


def supports(spec: Divergence, student: Scores, teacher: Scores) -> bool:
    """Return True where `divergence_sum` applies: student and teacher each have one plain bf16/fp16
    head on a GPU, at temperature 1, with a term for every entry of the vocabulary."""
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
    """Sum weight times divergence over all rows, as `lm_head.chunked_sum` does; see `supports`.

    Returns the sum and, detached, per row its ``loss``, the ``clipped`` share of its entries, and
    ``logp`` and ``teacher_logp`` of its id. ``factor`` maps the ids' log-probabilities to what each
    row's weight is multiplied by, a constant. Rows of weight 0 are as if absent from sum and gradients.

    Peak workspace: `linear_kernels.BLOCK_BYTES` for a block of the logits' gradient, [N, H] in float32
    and once more in the hidden states' dtype, and a copy of each head [V, H] whose dtype is not theirs.
    """
    ((hidden_NH, head, _),), ((teacher_NH, teacher_head, _),) = student.terms, teacher.terms
    states = (
        hidden_NH, head.weight_VH.to(hidden_NH.dtype),
        teacher_NH, teacher_head.weight_VH.to(teacher_NH.dtype),
    )  # fmt: skip
    sides = LinearSides(*(x.detach().contiguous() for x in states))
    sums = linear_kernels.sums(sides, ids_N, spec.kind)
    losses = linear_kernels.losses(sides, sums, spec.kind, spec.beta, spec.jsd_factor, spec.clip)
    scale_N = weight_N.detach().float()
    if factor is not None:
        scale_N = scale_N * factor(sums.logp_N)
    absent_N = weight_N == 0
    scale_N = scale_N.masked_fill(absent_N, 0.0)
    total = (scale_N * losses.loss_N).masked_fill(absent_N, 0.0).sum()
    sources = (hidden_NH, head.weight_VH, None)
    grads = _gradients(spec, sides, sums, losses.slope_sum_N, scale_N, absent_N, sources)
    values = {
        "loss": losses.loss_N, "clipped": losses.clipped_N, "logp": sums.logp_N,
        "teacher_logp": sums.teacher_logp_N,
    }  # fmt: skip
    return WithGradients.apply(total, *grads, *sources), values  # type: ignore[return-value]


def _gradients(
    spec: Divergence, sides: LinearSides, sums: linear_kernels.LinearSums, slope_sum_N: Tensor,
    scale_N: Tensor, absent_N: Tensor, sources: tuple[Tensor, Tensor, None],
) -> tuple[Tensor | None, Tensor | None, None]:  # fmt: skip
    """Compute the sum's gradients in hidden states (float32) and head (its dtype), where needed."""
    hidden_NH, head_VH, _ = sources
    grad_NH = (
        torch.zeros_like(hidden_NH, dtype=torch.float32) if needs_gradient(hidden_NH) else None
    )
    grad_VH = torch.empty_like(head_VH) if needs_gradient(head_VH) else None
    if grad_NH is None and grad_VH is None:
        return None, None, None
    student_NH = sides.student_NH.masked_fill(absent_N[:, None], 0.0)  # 0 times NaN is NaN
    N, V = len(hidden_NH), len(head_VH)
    entries = linear_kernels.BLOCK_BYTES // (N * hidden_NH.element_size())
    tile = linear_kernels.GRADIENT.entries
    width = min(V, max(1, entries // tile) * tile)
    memory = hidden_NH.new_empty(N * width)
    for first in range(0, V, width):
        block = slice(first, min(first + width, V))
        grad_NW = memory[: N * (block.stop - first)].view(N, -1)
        linear_kernels.gradient_block(
            sides, sums, slope_sum_N, scale_N, grad_NW, first,
            spec.kind, spec.beta, spec.jsd_factor, spec.clip,
        )  # fmt: skip
        if grad_NH is not None:
            matmul.addmm_into(grad_NH, grad_NW, sides.student_VH[block])
        if grad_VH is not None:
            matmul.mm_into(grad_VH[block], grad_NW.T, student_NH)
    return grad_NH, grad_VH, None
