"""The two objectives, behind one seam: distillation from the self-teacher, and GRPO.

Both say how much each token counts (`weigh`) and what is lost on it (`per_token`); the sum is
divided by one count over all ranks and micro-batches, so that no split of a batch changes anything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from selfteach import divergence
from selfteach.policy_gradient import (
    clipped_surrogate,
    group_advantages,
    importance_weight,
    k3,
    token_logp,
)
from selfteach.types import Batch, Critique, Lesson, Signal

Aggregation = Literal["token_mean", "sequence_mean"]
Gate = Literal["all", "wrong", "right"]


@dataclass(frozen=True, slots=True)
class Distillation:
    """Divergence between the student and the self-teacher, on the tokens that pass the gates.

    Token mean: every token that passes counts alike. Sequence mean: every answer with such a token
    counts alike. A lesson that is gated out, or was dropped, is absent from the denominator too.
    """

    spec: divergence.Divergence
    sampling_temperature: float
    gate: Gate = "all"
    from_first_error: bool = False
    aggregation: Aggregation = "token_mean"
    importance_cap: float | None = None
    needs_teacher: bool = True

    def weigh(self, lessons: Sequence[Lesson]) -> tuple[list[Signal], float]:
        """Weights by gate; the denominator is the number of tokens (answers) that count."""
        masks = [self._mask(lesson) for lesson in lessons]
        return _aggregate(masks, [0.0] * len(masks), self.aggregation)

    def _mask(self, lesson: Lesson) -> list[float]:
        length = len(lesson.rollout.answer_ids)
        correct = lesson.marked.verdict.correct
        shut_out = (self.gate == "wrong" and correct) or (self.gate == "right" and not correct)
        if lesson.teacher_prompt_ids is None or shut_out:
            return [0.0] * length
        begin = lesson.scored_from
        if self.from_first_error:
            begin = length if lesson.first_error_token is None else lesson.first_error_token
        return [0.0] * begin + [1.0] * (length - begin)

    def per_token(
        self, logits_CV: Tensor, teacher_logits_CV: Tensor | None, batch: Batch, rows: slice
    ) -> Mapping[str, Tensor]:
        """The divergence of each token, its advantage, and the student's log-probability."""
        assert teacher_logits_CV is not None, "distillation asks for a teacher"
        ids_C = batch.ids_N[rows]
        told = divergence.per_token(self.spec, logits_CV, teacher_logits_CV, ids_C)
        logp_C = token_logp(logits_CV.detach(), ids_C, self.sampling_temperature)
        loss_C = told.loss
        if self.importance_cap is not None:
            loss_C = loss_C * importance_weight(
                logp_C, batch.sampled_logp_N[rows], self.importance_cap
            )
        return {
            "loss": loss_C,
            "logp": logp_C,
            "advantage": told.advantage,
            "clipped": told.clipped,
        }


@dataclass(frozen=True, slots=True)
class Grpo:
    """Group-relative policy optimisation (arXiv:2402.03300), as used today.

    Every answer of the step counts in the denominator, also those of groups that score alike and
    have no gradient. With ``kl_weight`` the initial policy is asked for as teacher, on the student's
    own prompt.
    """

    sampling_temperature: float
    normalise: Literal["std", "none"] = "std"
    clip_low: float = 0.2
    clip_high: float = 0.2
    kl_weight: float = 0.0
    aggregation: Aggregation = "token_mean"
    importance_cap: float | None = None

    @property
    def needs_teacher(self) -> bool:
        """Only a penalty towards the initial policy asks for one."""
        return self.kl_weight > 0

    def weigh(self, lessons: Sequence[Lesson]) -> tuple[list[Signal], float]:
        """Advantages within each question's group; the denominator counts all tokens (answers)."""
        advantages = group_advantages(
            [float(lesson.marked.verdict.correct) for lesson in lessons],
            [lesson.rollout.problem.id for lesson in lessons],
            normalise=self.normalise,
        )
        masks = [
            [float(i >= lesson.scored_from) for i in range(len(lesson.rollout.answer_ids))]
            for lesson in lessons
        ]
        signals, denominator = _aggregate(masks, advantages, self.aggregation)
        if not self.needs_teacher:
            signals = [s if s.advantage else Signal((0.0,) * len(s.weights)) for s in signals]
        return signals, denominator

    def per_token(
        self, logits_CV: Tensor, teacher_logits_CV: Tensor | None, batch: Batch, rows: slice
    ) -> Mapping[str, Tensor]:
        """The clipped surrogate (and penalty) of each token."""
        ids_C = batch.ids_N[rows]
        logp_C = token_logp(logits_CV, ids_C, self.sampling_temperature)
        sampled_C = batch.sampled_logp_N[rows]
        old_C = logp_C.detach() if batch.old_logp_N is None else batch.old_logp_N[rows]
        loss_C, clipped_C = clipped_surrogate(
            logp_C, old_C, batch.advantage_N[rows], clip_low=self.clip_low, clip_high=self.clip_high
        )
        if self.importance_cap is not None:
            loss_C = loss_C * importance_weight(old_C, sampled_C, self.importance_cap)
        said = {"logp": logp_C.detach(), "clipped": clipped_C}
        if self.needs_teacher:
            assert teacher_logits_CV is not None
            reference_C = token_logp(teacher_logits_CV, ids_C, self.sampling_temperature)
            said["kl"] = k3(logp_C, reference_C)
            loss_C = loss_C + self.kl_weight * said["kl"]
        return {"loss": loss_C, **said}


def first_error_token(lesson_critique: object, step_spans: Sequence[tuple[int, int]]) -> int | None:
    """Where the first wrong step begins, from a critique and the answer's steps in tokens."""
    if not isinstance(lesson_critique, Critique) or lesson_critique.first_error is None:
        return None
    index = lesson_critique.first_error
    return step_spans[index][0] if index < len(step_spans) else None


def _aggregate(
    masks: Sequence[Sequence[float]], advantages: Sequence[float], aggregation: Aggregation
) -> tuple[list[Signal], float]:
    """Weights that make the sum over tokens, divided by the denominator, the wanted mean."""
    if aggregation == "token_mean":
        signals = [Signal(tuple(m), a) for m, a in zip(masks, advantages, strict=True)]
        return signals, sum(map(sum, masks))
    signals = [
        Signal(tuple(w / sum(m) for w in m) if any(m) else tuple(m), a)
        for m, a in zip(masks, advantages, strict=True)
    ]
    return signals, float(sum(any(m) for m in masks))
