"""Compute the loss of group-relative policy optimisation in its published forms.

GRPO (arXiv:2402.03300), Dr. GRPO (arXiv:2503.20783), DAPO (arXiv:2503.14476), GSPO (arXiv:2507.18071)
and CISPO (MiniMax-M1, arXiv:2506.13585) differ in a few choices, each a field of `Grpo`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from selfteach.losses import aggregation
from selfteach.losses.aggregation import Masks, num_counted
from selfteach.losses.policy_gradient import (
    RewardScale,
    cispo_surrogate,
    clipped_surrogate,
    group_advantages,
    importance_weight,
    k3,
    sequence_means,
    token_logp,
)
from selfteach.losses.sampled_kl import sampled_logp
from selfteach.losses.token_masks import scored_tokens
from selfteach.models.lm_head import Scores
from selfteach.protocols import chunked_loss
from selfteach.types import Batch, TokenWeights, TrainingSample


@dataclass(frozen=True, slots=True)
class Grpo:
    """Minimises the loss of group-relative policy optimisation (arXiv:2402.03300).

    Every rollout of the step is in the denominator, also those of groups with equal rewards, which
    have no gradient, unless ``mixed_groups_only``. With ``kl_coef`` the teacher is the initial policy,
    on the student's prompt.
    """

    sampling_temperature: float
    scale_rewards: RewardScale = "group"
    surrogate: Literal["clipped", "cispo"] = "clipped"
    importance_level: Literal["token", "sequence"] = "token"
    """Ratio to the old policy: each token's, or the geometric mean over a rollout's tokens (GSPO)."""
    clip_low: float = 0.2
    clip_high: float = 0.2
    clip_delta: float | None = None
    """Largest ratio of a token with a negative advantage; None: no bound."""
    kl_coef: float = 0.0
    aggregation: Literal["token_mean", "sequence_mean", "max_tokens"] = "token_mean"
    mask_truncated: bool = False
    """Leave rollouts that a limit has ended out of the loss, not out of the advantages."""
    importance_cap: float | None = None
    max_tokens: int = 1
    """Token limit of a rollout: ``aggregation = "max_tokens"`` divides by it."""
    mixed_groups_only: bool = False
    """Leave groups with equal rewards out of the loss and of its denominators (DAPO)."""

    @property
    def needs_teacher(self) -> bool:
        """Return whether there is a KL penalty towards the initial policy."""
        return self.kl_coef > 0

    def masks(self, samples: Sequence[TrainingSample]) -> list[list[float]]:
        """Return 1 for each scored token, also in groups with equal rewards; 0 in masked rollouts."""
        counted = self._counted(samples)
        return [
            [
                float(scored and in_loss and not self._is_masked(sample))
                for scored in scored_tokens(sample)
            ]
            for sample, in_loss in zip(samples, counted, strict=True)
        ]

    def advantages(self, samples: Sequence[TrainingSample]) -> list[float]:
        """Compute each rollout's advantage within the group of its problem.

        With ``mixed_groups_only`` the other groups have no part in a standard deviation of the batch.
        """
        counted = self._counted(samples)
        chosen = [sample for sample, in_loss in zip(samples, counted, strict=True) if in_loss]
        values = iter(_advantages(chosen, self.scale_rewards))
        return [next(values) if in_loss else 0.0 for in_loss in counted]

    def denominators(self, samples: Sequence[TrainingSample]) -> tuple[float, ...]:
        """Return the number of all scored tokens, of rollouts, or of rollouts times the token limit."""
        return (self.count(samples, self.masks(samples)),)

    def count(self, samples: Sequence[TrainingSample], masks: Masks) -> float:
        """Return the denominator for some masks; a rollout that was masked for its length counts."""
        if self.aggregation == "token_mean":
            return num_counted(masks, "token_mean")
        counted = self._counted(samples)
        if self.aggregation == "max_tokens":
            return float(sum(counted) * self.max_tokens)
        return num_counted(masks, "sequence_mean") + sum(
            in_loss and self._is_masked(sample)
            for sample, in_loss in zip(samples, counted, strict=True)
        )

    def normalize(self, masks: Masks, count: float) -> list[list[float]]:
        """Return weights with which the sum over tokens is the mean that ``count`` belongs to."""
        by_rollout = self.aggregation == "sequence_mean"
        return aggregation.normalize(masks, count, "sequence_mean" if by_rollout else "token_mean")

    def token_weights(
        self, samples: Sequence[TrainingSample], counts: Sequence[float], update: int = 0
    ) -> list[TokenWeights]:
        """Return weights and group advantages; weights are 0 with neither advantage nor penalty."""
        weights = self.normalize(self.masks(samples), counts[0])
        return [
            TokenWeights(
                tuple(row) if advantage or self.needs_teacher else (0.0,) * len(row), advantage
            )
            for row, advantage in zip(weights, self.advantages(samples), strict=True)
        ]

    def per_token(
        self, logits_CV: Tensor, teacher_logits_CV: Tensor | None, batch: Batch, rows: slice
    ) -> Mapping[str, Tensor]:
        """Compute the surrogate (and KL penalty) of each token."""
        ids_C = batch.ids_N[rows]
        logp_C = token_logp(logits_CV, ids_C, self.sampling_temperature)
        old_C = logp_C.detach() if batch.old_logp_N is None else batch.old_logp_N[rows]
        loss_C, clipped_C = self._surrogate(logp_C, old_C, batch, rows)
        values = {"logp": logp_C.detach(), "clipped": clipped_C}
        if self.importance_cap is not None:
            weight_C = importance_weight(old_C, batch.sampled_logp_N[rows], self.importance_cap)
            values["importance_capped"] = (weight_C >= self.importance_cap).float()
            if batch.sequence_weight_N is not None:
                weight_C = batch.sequence_weight_N[rows]
            loss_C = loss_C * weight_C
        if self.needs_teacher:
            assert teacher_logits_CV is not None
            reference_C = token_logp(teacher_logits_CV, ids_C, self.sampling_temperature)
            values["kl"] = k3(logp_C, reference_C)
            loss_C = loss_C + self.kl_coef * values["kl"]
        return {"loss": loss_C, **values}

    def loss(
        self, student: Scores, teacher: Scores | None, batch: Batch, chunk_tokens: int
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Sum weight times loss over a micro-batch, chunk by chunk."""
        batch = self.with_sequence_ratios(student, batch, chunk_tokens)
        return chunked_loss(self, student, teacher, batch, chunk_tokens)

    def with_sequence_ratios(self, student: Scores, batch: Batch, chunk_tokens: int) -> Batch:
        """Return the batch with each rollout's ratio and importance weight, where they are needed.

        Tokens are summed chunk by chunk, but a ratio of the whole rollout is a mean over all of its
        tokens in this loss: one more pass through the head, without gradient.
        """
        needed = batch.old_logp_N is not None or self.importance_cap is not None
        if self.importance_level == "token" or not needed:
            return batch
        logp_N = sampled_logp(
            student, batch.ids_N, temperature=self.sampling_temperature, chunk_tokens=chunk_tokens
        )
        old_N = logp_N if batch.old_logp_N is None else batch.old_logp_N
        in_loss_N = batch.weight_N != 0
        if batch.share_N is not None:  # a token that is only distilled has no part in the ratio
            in_loss_N = in_loss_N & (batch.share_N < 1)

        def of_rollouts(values_N: Tensor) -> Tensor:
            rows = len(batch.student.ids_BT)
            return sequence_means(values_N, batch.student.rows_N, in_loss_N, rows)

        weight_N = None
        # CISPO's loss stays one of each token, and so does its weight.
        if self.importance_cap is not None and self.surrogate == "clipped":
            token_weight_N = importance_weight(old_N, batch.sampled_logp_N, self.importance_cap)
            weight_N = of_rollouts(token_weight_N)
        return dataclasses.replace(
            batch, sequence_logratio_N=of_rollouts(logp_N - old_N), sequence_weight_N=weight_N
        )

    def _surrogate(
        self, logp_C: Tensor, old_C: Tensor, batch: Batch, rows: slice
    ) -> tuple[Tensor, Tensor]:
        """Return each token's surrogate as a loss, and 1 where the clip acts."""
        if batch.sequence_logratio_N is not None:
            # The rollout's ratio in value, with the gradient of each token's log-probability: summed
            # over tokens of equal weight this is the gradient of the geometric mean.
            old_C = logp_C.detach() - batch.sequence_logratio_N[rows]
        advantage_C = batch.advantage_N[rows]
        if self.surrogate == "cispo":
            return cispo_surrogate(logp_C, old_C, advantage_C, cap=1 + self.clip_high)
        return clipped_surrogate(
            logp_C, old_C, advantage_C,
            clip_low=self.clip_low, clip_high=self.clip_high, delta=self.clip_delta,
        )  # fmt: skip

    def _is_masked(self, sample: TrainingSample) -> bool:
        return self.mask_truncated and not sample.rollout.finished

    def _counted(self, samples: Sequence[TrainingSample]) -> list[bool]:
        """Return whether each sample's group is in the loss."""
        if not self.mixed_groups_only:
            return [True] * len(samples)
        advantages = _advantages(samples, "none")
        mixed = {
            sample.rollout.problem.id
            for sample, advantage in zip(samples, advantages, strict=True)
            if advantage
        }
        return [sample.rollout.problem.id in mixed for sample in samples]


def _advantages(samples: Sequence[TrainingSample], scale_rewards: RewardScale) -> list[float]:
    """Return each rollout's advantage in the group of its problem.

    A rollout without a reward has the advantage 0 and no part in means and deviations, as in TRL.
    """
    rewards = [sample.critiqued.verdict.reward for sample in samples]
    scored = [
        (reward, sample.rollout.problem.id)
        for reward, sample in zip(rewards, samples, strict=True)
        if reward is not None
    ]
    values, groups = [reward for reward, _ in scored], [group for _, group in scored]
    advantages = iter(group_advantages(values, groups, scale_rewards=scale_rewards))
    return [0.0 if reward is None else next(advantages) for reward in rewards]
