"""Compute the training objectives: distillation from the self-teacher, GRPO, and a mixture of both.

Each returns its denominators (`denominators`), each token's weight (`token_weights`), each token's
loss (`per_token`) and the weighted sum of the losses (`loss`). Denominators are summed over all
ranks and micro-batches, so that no split of a step changes the loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from selfteach.losses import divergence, fused
from selfteach.losses.aggregation import Aggregation, Masks, normalize, num_counted
from selfteach.losses.grpo import Grpo
from selfteach.losses.policy_gradient import importance_weight, token_logp
from selfteach.losses.token_masks import TokenMask
from selfteach.models.lm_head import Scores
from selfteach.protocols import chunked_loss
from selfteach.types import Batch, TokenWeights, TrainingSample


@dataclass(frozen=True, slots=True)
class Distillation:
    """Minimises a divergence between student and self-teacher on the tokens that pass the mask.

    Token mean: every token that passes has the same weight. Sequence mean: every rollout with such a
    token has. A sample that is masked out, or was dropped, is absent from the denominator too.
    """

    spec: divergence.Divergence
    sampling_temperature: float
    token_mask: TokenMask = field(default_factory=TokenMask)
    aggregation: Aggregation = "token_mean"
    importance_cap: float | None = None
    needs_teacher: bool = True

    def masks(self, samples: Sequence[TrainingSample]) -> list[list[float]]:
        """Return 1 for each token that passes the mask, else 0."""
        return [self.token_mask.mask(sample) for sample in samples]

    def denominators(self, samples: Sequence[TrainingSample]) -> tuple[float, ...]:
        """Return the number of tokens (or rollouts) in the loss."""
        return (num_counted(self.masks(samples), self.aggregation),)

    def token_weights(
        self, samples: Sequence[TrainingSample], counts: Sequence[float], update: int = 0
    ) -> list[TokenWeights]:
        """Return weights from the masks, with the denominator in them."""
        weights = normalize(self.masks(samples), counts[0], self.aggregation)
        return [TokenWeights(tuple(sample_weights)) for sample_weights in weights]

    def per_token(
        self, logits_CV: Tensor, teacher_logits_CV: Tensor | None, batch: Batch, rows: slice
    ) -> Mapping[str, Tensor]:
        """Compute each token's divergence, teacher log-ratio, and the student's log-probability."""
        assert teacher_logits_CV is not None, "distillation needs a teacher"
        ids_C = batch.ids_N[rows]
        result = divergence.per_token(
            self.spec,
            logits_CV,
            teacher_logits_CV,
            ids_C,
            sampling_temperature=self.sampling_temperature,
            donate_teacher_logits=True,
        )
        logp_C = result.logp
        if self.spec.temperature != self.sampling_temperature:
            logp_C = token_logp(logits_CV.detach(), ids_C, self.sampling_temperature)
        values = {
            "logp": logp_C, "teacher_logratio": result.teacher_logratio, "clipped": result.clipped,
        }  # fmt: skip
        if self.importance_cap is None:
            return {"loss": result.loss, **values}
        cap, sampled_C = self.importance_cap, batch.sampled_logp_N[rows]
        weight_C = importance_weight(logp_C, sampled_C, cap)
        return {
            "loss": result.loss * weight_C,
            **values,
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
        """Return whether `fused` computes what `per_token` does for these scores."""
        return self.sampling_temperature == 1 and fused.supports(self.spec, student, teacher)

    def _fused_loss(
        self,
        student: Scores,
        teacher: Scores,
        batch: Batch,
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Compute what `chunked_loss` returns, without holding a chunk's logits."""
        cap = self.importance_cap

        def importance(logp_N: Tensor) -> Tensor:
            if cap is None:
                return torch.ones_like(logp_N)
            return importance_weight(logp_N, batch.sampled_logp_N, cap)

        total, fused_values = fused.divergence_sum(
            self.spec, student, teacher, batch.ids_N, batch.weight_N, importance
        )
        logp_N = fused_values["logp"]
        weight_N = importance(logp_N)
        values = {
            "loss": fused_values["loss"] * weight_N, "logp": logp_N,
            "teacher_logratio": fused_values["teacher_logp"] - logp_N,
            "clipped": fused_values["clipped"],
        }  # fmt: skip
        if cap is not None:
            values["importance_capped"] = (weight_N >= cap).float()
        return total, values


@dataclass(frozen=True, slots=True)
class Anneal:
    """Anneals a weight linearly from ``start`` to ``end``, where it stays.

    It depends on the number of updates alone, so that a resumed run reproduces it.
    """

    start: float
    end: float
    updates: int = 0
    """Updates after which the end is reached; 0: from the first."""

    def __call__(self, update: int) -> float:
        """Return the weight after ``update`` updates."""
        progress = min(1.0, update / self.updates) if self.updates else 1.0
        return (1 - progress) * self.start + progress * self.end


@dataclass(frozen=True, slots=True)
class Hybrid:
    """Minimises w L_distillation + v L_grpo, each a mean with its own denominator.

    w is ``weight`` at the update that the step begins with; v is ``grpo_weight``, or 1 − w where
    that is None: a mixture, which is GRPO at w = 0 and distillation at w = 1. With
    ``grpo_tokens = "others"`` GRPO has the tokens that pass distillation's mask neither in its sum
    nor in its denominator (TRACE, arXiv:2605.10194). A rollout without a teacher prompt has GRPO's
    loss alone.

    Both share one pass: a token's weight is a + b, with a = w m_d / n_d and b = v m_g / n_g of the
    masks m and denominators n, and its loss the mean of both in the proportion a : b.
    """

    distillation: Distillation
    grpo: Grpo
    weight: Anneal
    grpo_weight: float | None = None
    grpo_tokens: Literal["all", "others"] = "all"
    needs_teacher: bool = True

    def denominators(self, samples: Sequence[TrainingSample]) -> tuple[float, ...]:
        """Return distillation's denominator, then GRPO's."""
        distilled, rewarded = self._masks(samples)
        return (
            num_counted(distilled, self.distillation.aggregation),
            self.grpo.count(samples, rewarded),
        )

    def token_weights(
        self, samples: Sequence[TrainingSample], counts: Sequence[float], update: int
    ) -> list[TokenWeights]:
        """Return both weights of each token, as their sum and distillation's share of it."""
        w = self.weight(update)
        v = 1 - w if self.grpo_weight is None else self.grpo_weight
        distilled, rewarded = self._masks(samples)
        a = normalize(distilled, counts[0], self.distillation.aggregation)
        b = self.grpo.normalize(rewarded, counts[1])
        return [
            _mixed([w * x for x in row_a], [v * x if advantage else 0.0 for x in row_b], advantage)
            for row_a, row_b, advantage in zip(a, b, self.grpo.advantages(samples), strict=True)
        ]

    def per_token(
        self, logits_CV: Tensor, teacher_logits_CV: Tensor | None, batch: Batch, rows: slice
    ) -> Mapping[str, Tensor]:
        """Compute the mixed loss of each token; ``teacher_logratio`` is 0 where there is no teacher."""
        assert batch.share_N is not None
        share_C = batch.share_N[rows]
        rewarded = self._with_cap(self.grpo.per_token(logits_CV, None, batch, rows))
        if teacher_logits_CV is None:
            return {
                **rewarded,
                "teacher_logratio": torch.zeros_like(share_C),
                "distillation_share": share_C,
            }
        # Where distillation has no share, a non-finite teacher logit must not reach the loss.
        grpo_only_C1 = (share_C == 0)[:, None]
        teacher_CV = torch.where(grpo_only_C1, logits_CV.detach(), teacher_logits_CV)
        distilled = self._with_cap(self.distillation.per_token(logits_CV, teacher_CV, batch, rows))
        mixed = {
            name: share_C * distilled[name] + (1 - share_C) * rewarded[name]
            for name in ("loss", "clipped", "importance_capped")
            if name in distilled
        }
        return {
            **mixed,
            "logp": distilled["logp"],
            "teacher_logratio": distilled["teacher_logratio"],
            "distillation_share": share_C,
        }

    def loss(
        self, student: Scores, teacher: Scores | None, batch: Batch, chunk_tokens: int
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Sum weight times loss over a micro-batch, chunk by chunk."""
        batch = self.grpo.with_sequence_ratios(student, batch, chunk_tokens)
        return chunked_loss(self, student, teacher, batch, chunk_tokens)

    def _with_cap(self, values: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Add ``importance_capped`` where either objective has a cap: 0 for the one without."""
        if self.distillation.importance_cap is None and self.grpo.importance_cap is None:
            return values
        return {"importance_capped": torch.zeros_like(values["loss"]), **values}

    def _masks(self, samples: Sequence[TrainingSample]) -> tuple[Masks, Masks]:
        distilled, rewarded = self.distillation.masks(samples), self.grpo.masks(samples)
        if self.grpo_tokens == "others":
            rewarded = [
                [r * (1 - d) for r, d in zip(row_r, row_d, strict=True)]
                for row_r, row_d in zip(rewarded, distilled, strict=True)
            ]
        return distilled, rewarded


def _mixed(a: Sequence[float], b: Sequence[float], advantage: float) -> TokenWeights:
    weights = tuple(x + y for x, y in zip(a, b, strict=True))
    shares = tuple(x / w if w else 0.0 for x, w in zip(a, weights, strict=True))
    return TokenWeights(weights, advantage, shares)
