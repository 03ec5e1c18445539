"""Select the tokens of a rollout that may be in a loss, and those that are in distillation's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from selfteach.types import TrainingSample

TrainOn = Literal["all", "incorrect", "correct"]


def scored_tokens(sample: TrainingSample) -> list[bool]:
    """Return whether each token may be in a loss: the model's tokens, without unscored thoughts."""
    scored = sample.rollout.model_mask
    scored[: sample.scored_from] = [False] * min(sample.scored_from, len(scored))
    for start, stop in sample.unscored:
        scored[start:stop] = [False] * (stop - start)
    return scored


@dataclass(frozen=True, slots=True)
class TokenMask:
    """Holds conditions on a rollout and its tokens; a token passes if it meets all of them.

    Example: a rollout of 20 tokens in steps of 5, whose second and third steps the critique changes,
    passes tokens 5 to 19 ``from_first_error`` and tokens 5 to 9 with ``changed_steps_fraction = 0.25``.
    """

    train_on: TrainOn = "all"
    """Rollouts by verdict: SDPG (arXiv:2606.04036) trains on ``correct`` ones."""
    from_first_error: bool = False
    """Only tokens from the first wrong step on (ROSD, arXiv:2605.28014)."""
    changed_steps_fraction: float | None = None
    """Only steps that the critique does not repeat, their earliest tokens, and at most this fraction of
    the tokens that the model has sampled, rounded down (TRACE, arXiv:2605.10194, uses at most 0.25)."""

    def mask(self, sample: TrainingSample) -> list[float]:
        """Return 1 for each token that passes, else 0; all 0 for a sample without a teacher prompt."""
        passing = scored_tokens(sample)
        correct = sample.critiqued.verdict.correct
        excluded = (self.train_on == "incorrect" and correct) or (
            self.train_on == "correct" and not correct
        )
        if sample.teacher_prompt_ids is None or excluded:
            return [0.0] * len(passing)
        if self.from_first_error:
            error = sample.first_error_token
            before = len(passing) if error is None else error
            passing[:before] = [False] * before
        if self.changed_steps_fraction is not None:
            passing = self._in_changed_steps(sample, self.changed_steps_fraction, passing)
        return [float(passes) for passes in passing]

    @staticmethod
    def _in_changed_steps(
        sample: TrainingSample, fraction: float, passing: list[bool]
    ) -> list[bool]:
        chosen = [False] * len(passing)
        remaining = int(fraction * sample.rollout.length)
        for start, stop in sample.changed_spans:
            for token in range(start, stop):
                chosen[token] = passing[token] and remaining > 0
                remaining -= chosen[token]
        return chosen
