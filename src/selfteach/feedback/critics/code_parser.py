"""Parses a critic's program into a critique of an answer that is code, line by line."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from selfteach.feedback.alignment import lines_of, same_lines
from selfteach.feedback.critics.parser import (
    Trace,
    count_repeated,
    critique_of,
    failure,
    unlike,
    without_thought,
)
from selfteach.tasks.code.answer_code import write_code
from selfteach.tasks.code.code_steps import is_remark, statement_lines
from selfteach.tasks.code.code_verifier import CodeVerifier
from selfteach.tasks.segmentation import Splitter, content
from selfteach.types import Critique, CritiqueFailure, Problem, Rollout, Verdict

FENCE_LINE = re.compile(r"\s{0,3}(`{3,}|~{3,})")
CLOSING = re.compile(r"\s*(?:`{3,}|~{3,}|</answer>)")
"""Matches a line that ends the code of an answer, and belongs to it."""


@dataclass(frozen=True, slots=True)
class SplitAnswer:
    """Holds the steps of an answer: those of its code, and the lines before and after it."""

    before: tuple[str, ...]
    code: tuple[str, ...]
    after: tuple[str, ...]

    @property
    def steps(self) -> tuple[str, ...]:
        """Return all steps in order."""
        return self.before + self.code + self.after

    @property
    def closing(self) -> tuple[str, ...]:
        """Return the lines that end the code; a fence for one that is not closed."""
        lines = tuple(takewhile(CLOSING.match, self.after))
        is_open = not lines and self.before and (fence := FENCE_LINE.match(self.before[-1]))
        return (fence[1],) if is_open and fence else lines


@dataclass(frozen=True, slots=True)
class CodeCritiqueParser:
    """Parses critiques of answers that are code, in the form of a whole program.

    The critic's code takes the place of the answer's; what the answer says around its code is no
    matter of the critique, which repeats it before the code and after code that it changes leaves it
    out. Lines are compared with their indentation. The program must pass the problem's tests.
    """

    split_steps: Splitter
    verify: CodeVerifier
    min_similarity: float = 0.3
    """As in `CritiqueParser`, of the first lines of code."""

    def __call__(
        self, text: str, rollout: Rollout, verdict: Verdict, *, finished: bool = True
    ) -> Critique | CritiqueFailure:
        """Parse a critic's whole reply about a rollout; ``finished`` is False if it was truncated."""
        critique = without_thought(text, finished=finished)
        if isinstance(critique, CritiqueFailure):
            return critique
        problem = rollout.problem
        program = self.verify.code_of(problem, critique)
        written = () if program is None else steps_of_code(program.code)
        if not written:
            return failure("malformed", "no code in the critique")
        attempt = self.split(problem, rollout.text)
        repeated = count_repeated(attempt.code, written, lines_of)
        detail = unlike(attempt.code, written, repeated, self.min_similarity)
        if detail is not None:
            return failure("misaligned", detail, "\n".join(written))
        judged = self._judged(problem, attempt, written)
        if isinstance(judged, CritiqueFailure):
            return judged
        return critique_of_code(attempt, *judged, rollout, verdict)

    def split(self, problem: Problem, text: str) -> SplitAnswer:
        """Split an answer's steps at its code, the one that the verifier runs."""
        answer = self.verify.code_of(problem, text)
        spans = [span for span in self.split_steps(text) if span[0] < span[1]]
        begin = len(text) if answer is None else answer.begin
        end = begin + (0 if answer is None else len(answer.code))
        return SplitAnswer(
            tuple(content(text, span) for span in spans if span[0] < begin),
            tuple(content(text, span) for span in spans if begin <= span[0] < end),
            tuple(content(text, span) for span in spans if span[0] >= max(begin, end)),
        )

    def _judged(
        self, problem: Problem, attempt: SplitAnswer, written: Sequence[str]
    ) -> tuple[tuple[str, ...], str] | CritiqueFailure:
        """Return the program's steps and the answer in canonical form, if it passes the tests."""
        verdict = None
        for steps in dict.fromkeys((with_remarks(attempt.code, written), tuple(written))):
            verdict = self.verify(problem, write_code("\n".join(steps)))
            if verdict.correct and verdict.parsed is not None:
                return steps, verdict.parsed
        feedback = "" if verdict is None else verdict.feedback or ""
        detail = f"the critique's code fails: {'; '.join(feedback.splitlines())}"
        return failure("wrong_answer", detail, "\n".join(written))


def steps_of_code(code: str) -> tuple[str, ...]:
    """Return the steps of a program, with their indentation."""
    return tuple(code[a:b].rstrip() for a, b in statement_lines(code))


def critique_of_code(
    attempt: SplitAnswer,
    program: tuple[str, ...],
    answer: str,
    rollout: Rollout,
    verdict: Verdict,
) -> Critique:
    """Return the critique that has a program in the place of the answer's code."""
    if not attempt.code:
        corrected = ("```python", *program, "```")
    elif [*map(lines_of, program)] == [*map(lines_of, attempt.code)]:
        corrected = attempt.before + program + (attempt.after or attempt.closing)
    else:
        corrected = attempt.before + program + attempt.closing
    repeated = count_repeated(attempt.steps, corrected, lines_of)
    traces = Trace(attempt.steps, None), Trace(corrected, answer)
    return critique_of(*traces, repeated, rollout, verdict, lines_of)


def with_remarks(attempt: Sequence[str], written: Sequence[str]) -> tuple[str, ...]:
    """Return a critic's program with the attempt's comments and docstrings up to the first change.

    They do nothing, and critics drop them and write others: that is no error of the attempt.
    """
    merged: list[str] = []
    rest = deque(written)
    for step in attempt:
        remarks = sum(1 for _ in takewhile(is_remark, rest))
        if rest and same_lines(rest[0], step):
            merged.append(rest.popleft())
        elif is_remark(step):
            merged.append(step)
        elif remarks < len(rest) and same_lines(rest[remarks], step):
            rest = deque([*rest][remarks + 1 :])
            merged.append(step)
        else:
            rest = deque([*rest][remarks:]) if remarks < len(rest) else rest
            break
    return (*merged, *rest)
