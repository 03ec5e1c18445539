"""The objectives, behind one seam: distillation from the self-teacher, GRPO, and both at once.

All say what they divide by (`count`), how much each token counts (`weigh`) and what is lost on it
(`per_token`). The loss is the sum of weights times losses; counts are those of all ranks and
micro-batches, so that no split of a step changes anything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from selfteach.losses import divergence, fused
from selfteach.losses.policy_gradient import (
    clipped_surrogate,
    group_advantages,
    importance_weight,
    k3,
    token_logp,
)
from selfteach.losses.token_masks import TokenMask
from selfteach.models.lm_head import Scores
from selfteach.protocols import chunked_loss
from selfteach.types import Batch, TokenWeights, TrainingSample

Aggregation = Literal["token_mean", "sequence_mean"]
Masks = Sequence[Sequence[float]]
"""One number per token of each sample: 1 where it counts, else 0."""


@dataclass(frozen=True, slots=True)
class Distillation:
    """Divergence between the student and the self-teacher, on the tokens that pass the gate.

    Token mean: every token that passes counts alike. Sequence mean: every answer with such a token
    counts alike. A sample that is gated out, or was dropped, is absent from the denominator too.
    """

    spec: divergence.Divergence
    sampling_temperature: float
    token_mask: TokenMask = field(default_factory=TokenMask)
    aggregation: Aggregation = "token_mean"
    importance_cap: float | None = None
    needs_teacher: bool = True

    def masks(self, samples: Sequence[TrainingSample]) -> list[list[float]]:
        """The tokens that pass the gate."""
        return [self.token_mask.mask(sample) for sample in samples]

    def denominators(self, samples: Sequence[TrainingSample]) -> tuple[float, ...]:
        """Tokens (answers) that count."""
        return (num_counted(self.masks(samples), self.aggregation),)

    def token_weights(
        self, samples: Sequence[TrainingSample], counts: Sequence[float], update: int = 0
    ) -> list[TokenWeights]:
        """Weights by gate."""
        weights = normalize(self.masks(samples), counts[0], self.aggregation)
        return [TokenWeights(tuple(own)) for own in weights]

    def per_token(
        self, logits_CV: Tensor, teacher_logits_CV: Tensor | None, batch: Batch, rows: slice
    ) -> Mapping[str, Tensor]:
        """The divergence of each token, its advantage, and the student's log-probability."""
        assert teacher_logits_CV is not None, "distillation asks for a teacher"
        ids_C = batch.ids_N[rows]
        told = divergence.per_token(
            self.spec, logits_CV, teacher_logits_CV, ids_C, donate_teacher_logits=True
        )
        logp_C = told.logp
        if self.spec.temperature != self.sampling_temperature:
            logp_C = token_logp(logits_CV.detach(), ids_C, self.sampling_temperature)
        said = {"logp": logp_C, "teacher_logratio": told.teacher_logratio, "clipped": told.clipped}
        if self.importance_cap is None:
            return {"loss": told.loss, **said}
        cap, sampled_C = self.importance_cap, batch.sampled_logp_N[rows]
        weight_C = importance_weight(logp_C, sampled_C, cap)
        return {
            "loss": told.loss * weight_C,
            **said,
            "importance_capped": (weight_C >= cap).float(),
        }

    def loss(
        self, student: Scores, teacher: Scores | None, batch: Batch, chunk_tokens: int
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Sum weight times loss over a micro-batch, by a fused loss where one computes the same."""
        # A fused loss replaces this class's `per_token`, never that of a subclass.
        replaceable = type(self).per_token is Distillation.per_token
        if replaceable and teacher is not None and self._fuses(student, teacher):
            return self._fused_loss(student, teacher, batch)
        return chunked_loss(self, student, teacher, batch, chunk_tokens)

    def _fuses(self, student: Scores, teacher: Scores) -> bool:
        """Whether `fused` computes what `per_token` does for these scores."""
        return self.sampling_temperature == 1 and fused.supports(self.spec, student, teacher)

    def _fused_loss(
        self,
        student: Scores,
        teacher: Scores,
        batch: Batch,
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Return what `chunked_loss` does, without holding a chunk's logits."""
        cap = self.importance_cap

        def importance(logp_N: Tensor) -> Tensor:
            if cap is None:
                return torch.ones_like(logp_N)
            return importance_weight(logp_N, batch.sampled_logp_N, cap)

        loss, told = fused.divergence_sum(
            self.spec, student, teacher, batch.ids_N, batch.weight_N, importance
        )
        logp_N, weight_N = told["logp"], importance(told["logp"])
        said = {
            "loss": told["loss"] * weight_N, "logp": logp_N,
            "teacher_logratio": told["teacher_logp"] - logp_N, "clipped": told["clipped"],
        }  # fmt: skip
        if cap is not None:
            said["importance_capped"] = (weight_N >= cap).float()
        return loss, said


@dataclass(frozen=True, slots=True)
class Grpo:
    """Group-relative policy optimisation (arXiv:2402.03300), as used today.

    Every answer of the step counts in the denominator, also those of groups that score alike and
    have no gradient. With ``kl_coef`` the initial policy is asked for as teacher, on the student's
    own prompt.
    """

    sampling_temperature: float
    scale_rewards: Literal["group", "none"] = "group"
    clip_low: float = 0.2
    clip_high: float = 0.2
    kl_coef: float = 0.0
    aggregation: Aggregation = "token_mean"
    importance_cap: float | None = None

    @property
    def needs_teacher(self) -> bool:
        """Only a penalty towards the initial policy asks for one."""
        return self.kl_coef > 0

    def masks(self, samples: Sequence[TrainingSample]) -> list[list[float]]:
        """All tokens that are scored, also those of groups that score alike."""
        return [
            [float(i >= sample.scored_from) for i in range(len(sample.rollout.token_ids))]
            for sample in samples
        ]

    def advantages(self, samples: Sequence[TrainingSample]) -> list[float]:
        """How each answer compares with the others to its question."""
        return group_advantages(
            [float(sample.critiqued.verdict.correct) for sample in samples],
            [sample.rollout.problem.id for sample in samples],
            scale_rewards=self.scale_rewards,
        )

    def denominators(self, samples: Sequence[TrainingSample]) -> tuple[float, ...]:
        """All tokens (answers)."""
        return (num_counted(self.masks(samples), self.aggregation),)

    def token_weights(
        self, samples: Sequence[TrainingSample], counts: Sequence[float], update: int = 0
    ) -> list[TokenWeights]:
        """Advantages within each question's group; without one, and a penalty, nothing to do."""
        weights = normalize(self.masks(samples), counts[0], self.aggregation)
        return [
            TokenWeights(
                tuple(own) if advantage or self.needs_teacher else (0.0,) * len(own), advantage
            )
            for own, advantage in zip(weights, self.advantages(samples), strict=True)
        ]

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
        said = {"logp": logp_C.detach(), "clipped": clipped_C}
        if self.importance_cap is not None:
            weight_C = importance_weight(old_C, sampled_C, self.importance_cap)
            loss_C = loss_C * weight_C
            said["importance_capped"] = (weight_C >= self.importance_cap).float()
        if self.needs_teacher:
            assert teacher_logits_CV is not None
            reference_C = token_logp(teacher_logits_CV, ids_C, self.sampling_temperature)
            said["kl"] = k3(logp_C, reference_C)
            loss_C = loss_C + self.kl_coef * said["kl"]
        return {"loss": loss_C, **said}

    def loss(
        self, student: Scores, teacher: Scores | None, batch: Batch, chunk_tokens: int
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Sum weight times loss over a micro-batch, chunk by chunk."""
        return chunked_loss(self, student, teacher, batch, chunk_tokens)


@dataclass(frozen=True, slots=True)
class Anneal:
    """A weight that goes from ``start`` to ``end`` in a straight line and stays there.

    It depends on the number of updates alone, so that a resumed run repeats itself.
    """

    start: float
    end: float
    updates: int = 0
    """Updates after which the end is reached; 0: there from the first."""

    def __call__(self, update: int) -> float:
        """The weight after ``update`` updates."""
        done = min(1.0, update / self.updates) if self.updates else 1.0
        return (1 - done) * self.start + done * self.end


@dataclass(frozen=True, slots=True)
class Hybrid:
    """w L_distillation + v L_grpo, each a mean over a count of its own.

    w is ``weight`` at the update that the step begins with; v is ``grpo_weight``, or 1 − w where
    that is None: a mixture, which is GRPO at w = 0 and distillation at w = 1. With
    ``grpo_tokens = "others"`` GRPO has the tokens that pass distillation's gate neither in its sum
    nor in its count (TRACE, arXiv:2605.10194). An answer without a teacher's prompt learns by GRPO.

    Both share one pass: a token's weight is a + b, with a = w m_d / n_d and b = v m_g / n_g of the
    masks m and counts n, and its loss the mean of both in the proportion a : b.
    """

    distillation: Distillation
    grpo: Grpo
    weight: Anneal
    grpo_weight: float | None = None
    grpo_tokens: Literal["all", "others"] = "all"
    needs_teacher: bool = True

    def denominators(self, samples: Sequence[TrainingSample]) -> tuple[float, ...]:
        """Distillation's denominator, then GRPO's."""
        told, rewarded = self._masks(samples)
        return (
            num_counted(told, self.distillation.aggregation),
            num_counted(rewarded, self.grpo.aggregation),
        )

    def token_weights(
        self, samples: Sequence[TrainingSample], counts: Sequence[float], update: int
    ) -> list[TokenWeights]:
        """Both weights of each token, as their sum and distillation's share of it."""
        w = self.weight(update)
        v = 1 - w if self.grpo_weight is None else self.grpo_weight
        told, rewarded = self._masks(samples)
        a = normalize(told, counts[0], self.distillation.aggregation)
        b = normalize(rewarded, counts[1], self.grpo.aggregation)
        return [
            _mixed([w * x for x in own_a], [v * x if advantage else 0.0 for x in own_b], advantage)
            for own_a, own_b, advantage in zip(a, b, self.grpo.advantages(samples), strict=True)
        ]

    def per_token(
        self, logits_CV: Tensor, teacher_logits_CV: Tensor | None, batch: Batch, rows: slice
    ) -> Mapping[str, Tensor]:
        """The mixed loss of each token. Where distillation has no share, its advantage is 0."""
        assert batch.share_N is not None
        share_C = batch.share_N[rows]
        rewarded = self._stated(self.grpo.per_token(logits_CV, None, batch, rows))
        if teacher_logits_CV is None:
            return {
                **rewarded,
                "teacher_logratio": torch.zeros_like(share_C),
                "distillation_share": share_C,
            }
        # A teacher that is not asked about a token must not spoil it, whatever it says.
        alone_C1 = (share_C == 0)[:, None]
        teacher_CV = torch.where(alone_C1, logits_CV.detach(), teacher_logits_CV)
        told = self._stated(self.distillation.per_token(logits_CV, teacher_CV, batch, rows))
        mixed = {
            name: share_C * told[name] + (1 - share_C) * rewarded[name]
            for name in ("loss", "clipped", "importance_capped")
            if name in told
        }
        return {
            **mixed,
            "logp": told["logp"],
            "teacher_logratio": told["teacher_logratio"],
            "distillation_share": share_C,
        }

    def loss(
        self, student: Scores, teacher: Scores | None, batch: Batch, chunk_tokens: int
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Sum weight times loss over a micro-batch, chunk by chunk."""
        return chunked_loss(self, student, teacher, batch, chunk_tokens)

    def _stated(self, said: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """With the truncation of weights where either term has a cap: none by the one without."""
        if self.distillation.importance_cap is None and self.grpo.importance_cap is None:
            return said
        return {"importance_capped": torch.zeros_like(said["loss"]), **said}

    def _masks(self, samples: Sequence[TrainingSample]) -> tuple[Masks, Masks]:
        told, rewarded = self.distillation.masks(samples), self.grpo.masks(samples)
        if self.grpo_tokens == "others":
            rewarded = [
                [r * (1 - t) for r, t in zip(own_r, own_t, strict=True)]
                for own_r, own_t in zip(rewarded, told, strict=True)
            ]
        return told, rewarded


def num_counted(masks: Masks, aggregation: Aggregation) -> float:
    """The denominator of a mean over tokens, or over answers that have a token that counts."""
    counted = (sum(mask) if aggregation == "token_mean" else any(mask) for mask in masks)
    return float(sum(counted))


def normalize(masks: Masks, count: float, aggregation: Aggregation) -> list[list[float]]:
    """Weights with which the sum over tokens is the wanted mean; all 0 where nothing counts."""
    shares = []
    for mask in masks:
        among = count * (sum(mask) if aggregation == "sequence_mean" else 1)
        shares.append([weight / among if among else 0.0 for weight in mask])
    return shares


def _mixed(a: Sequence[float], b: Sequence[float], advantage: float) -> TokenWeights:
    weights = tuple(x + y for x, y in zip(a, b, strict=True))
    shares = tuple(x / w if w else 0.0 for x, w in zip(a, weights, strict=True))
    return TokenWeights(weights, advantage, shares)
