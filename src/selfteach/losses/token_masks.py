"""Gates: which tokens of an answer its teacher's word counts on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from selfteach.types import Lesson

Answers = Literal["all", "wrong", "right"]


@dataclass(frozen=True, slots=True)
class Gate:
    """Conditions on an answer and on its tokens; a token passes if it meets all of them.

    Example: an answer of 20 tokens in steps of 5, whose second and third steps the critique changes,
    passes tokens 5 to 19 ``from_first_error`` and tokens 5 to 9 with ``spans = 0.25``.
    """

    answers: Answers = "all"
    """By the verdict: SDPG (arXiv:2606.04036) takes ``right`` ones."""
    from_first_error: bool = False
    """From the first token of the first wrong step on (ROSD, arXiv:2605.28014)."""
    spans: float | None = None
    """Only steps that the critique does not repeat, the earliest tokens of them and at most this
    share of the answer's tokens, rounded down (TRACE, arXiv:2605.10194, marks at most 0.25)."""

    def mask(self, lesson: Lesson) -> list[float]:
        """1 for each token that passes, else 0; none of a lesson without a teacher's prompt."""
        length = len(lesson.rollout.answer_ids)
        correct = lesson.marked.verdict.correct
        shut_out = (self.answers == "wrong" and correct) or (
            self.answers == "right" and not correct
        )
        if lesson.teacher_prompt_ids is None or shut_out:
            return [0.0] * length
        begin = lesson.scored_from
        if self.from_first_error:
            error = lesson.first_error_token
            begin = length if error is None else max(begin, error)
        passing = [begin <= token for token in range(length)]
        if self.spans is not None:
            passing = self._marked(lesson, self.spans, passing)
        return [float(passes) for passes in passing]

    @staticmethod
    def _marked(lesson: Lesson, share: float, passing: list[bool]) -> list[bool]:
        marked = [False] * len(passing)
        room = int(share * len(passing))
        for start, stop in lesson.changed_spans:
            for token in range(start, stop):
                marked[token] = passing[token] and room > 0
                room -= marked[token]
        return marked
