"""An objective of one's own: the loss of each token, and the weight of each token in the step."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from selfteach.losses.policy_gradient import token_logp
from selfteach.protocols import Objective
from selfteach.types import Batch, TokenWeights, TrainingSample


class Reinforce(Objective):
    """Minimises −(reward − baseline) log p of each token: REINFORCE with a constant baseline."""

    needs_teacher = False

    def __init__(self, sampling_temperature: float, baseline: float = 0.5) -> None:
        self.sampling_temperature, self.baseline = sampling_temperature, baseline

    def denominators(self, samples: Sequence[TrainingSample]) -> tuple[float, ...]:
        """Return the number of tokens; it is summed over ranks before `token_weights` gets it."""
        return (float(sum(len(sample.rollout.token_ids) for sample in samples)),)

    def token_weights(
        self, samples: Sequence[TrainingSample], counts: Sequence[float], update: int
    ) -> list[TokenWeights]:
        """Return the same weight for every token, and the rollout's advantage."""
        return [
            TokenWeights(
                (1 / counts[0],) * len(sample.rollout.token_ids),
                float(sample.critiqued.verdict.correct) - self.baseline,
            )
            for sample in samples
        ]

    def per_token(
        self, logits_CV: Tensor, teacher_logits_CV: Tensor | None, batch: Batch, rows: slice
    ) -> Mapping[str, Tensor]:
        """Return the loss of some tokens, and what is logged of them as ``objective/surprise``."""
        logp_C = token_logp(logits_CV, batch.ids_N[rows], self.sampling_temperature)
        return {
            "loss": -batch.advantage_N[rows] * logp_C,
            "logp": logp_C.detach(),
            "surprise": -logp_C.detach(),
        }
