"""Select the tokens of a rollout that are in the distillation loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from selfteach.types import TrainingSample

TrainOn = Literal["all", "incorrect", "correct"]


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
    the rollout's tokens, rounded down (TRACE, arXiv:2605.10194, uses at most 0.25)."""

    def mask(self, sample: TrainingSample) -> list[float]:
        """Return 1 for each token that passes, else 0; all 0 for a sample without a teacher prompt."""
        length = len(sample.rollout.token_ids)
        correct = sample.critiqued.verdict.correct
        excluded = (self.train_on == "incorrect" and correct) or (
            self.train_on == "correct" and not correct
        )
        if sample.teacher_prompt_ids is None or excluded:
            return [0.0] * length
        first = sample.scored_from
        if self.from_first_error:
            error = sample.first_error_token
            first = length if error is None else max(first, error)
        passing = [first <= token for token in range(length)]
        if self.changed_steps_fraction is not None:
            passing = self._in_changed_steps(sample, self.changed_steps_fraction, passing)
        return [float(passes) for passes in passing]

    @staticmethod
    def _in_changed_steps(
        sample: TrainingSample, fraction: float, passing: list[bool]
    ) -> list[bool]:
        chosen = [False] * len(passing)
        remaining = int(fraction * len(passing))
        for start, stop in sample.changed_spans:
            for token in range(start, stop):
                chosen[token] = passing[token] and remaining > 0
                remaining -= chosen[token]
        return chosen
