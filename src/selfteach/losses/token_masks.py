"""Gates: which tokens of an answer its teacher's word counts on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from selfteach.types import TrainingSample

TrainOn = Literal["all", "incorrect", "correct"]


@dataclass(frozen=True, slots=True)
class TokenMask:
    """Conditions on an answer and on its tokens; a token passes if it meets all of them.

    Example: an answer of 20 tokens in steps of 5, whose second and third steps the critique changes,
    passes tokens 5 to 19 ``from_first_error`` and tokens 5 to 9 with ``changed_steps_fraction = 0.25``.
    """

    train_on: TrainOn = "all"
    """Rollouts by verdict: SDPG (arXiv:2606.04036) takes ``correct`` ones."""
    from_first_error: bool = False
    """From the first token of the first wrong step on (ROSD, arXiv:2605.28014)."""
    changed_steps_fraction: float | None = None
    """Only steps that the critique does not repeat, the earliest tokens of them and at most this
    share of the answer's tokens, rounded down (TRACE, arXiv:2605.10194, marks at most 0.25)."""

    def mask(self, sample: TrainingSample) -> list[float]:
        """1 for each token that passes, else 0; none of a sample without a teacher's prompt."""
        length = len(sample.rollout.token_ids)
        correct = sample.critiqued.verdict.correct
        shut_out = (self.train_on == "incorrect" and correct) or (
            self.train_on == "correct" and not correct
        )
        if sample.teacher_prompt_ids is None or shut_out:
            return [0.0] * length
        begin = sample.scored_from
        if self.from_first_error:
            error = sample.first_error_token
            begin = length if error is None else max(begin, error)
        passing = [begin <= token for token in range(length)]
        if self.changed_steps_fraction is not None:
            passing = self._in_changed_steps(sample, self.changed_steps_fraction, passing)
        return [float(passes) for passes in passing]

    @staticmethod
    def _in_changed_steps(sample: TrainingSample, share: float, passing: list[bool]) -> list[bool]:
        chosen = [False] * len(passing)
        room = int(share * len(passing))
        for start, stop in sample.changed_spans:
            for token in range(start, stop):
                chosen[token] = passing[token] and room > 0
                room -= chosen[token]
        return chosen
