"""Parses a critic's program into a critique of an answer that is code, line by line."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from selfteach.feedback.alignment import same_lines
from selfteach.feedback.critics.parser import (
    CritiqueParser,
    Trace,
    count_repeated,
    critique_of,
    failure,
    unlike,
    without_thought,
)
from selfteach.tasks.code.answer_code import write_code
from selfteach.tasks.code.answer_parts import AnswerParts, lines_of, parts_of, steps_of_code
from selfteach.tasks.code.code_steps import is_remark
from selfteach.tasks.code.code_verifier import CodeVerifier
from selfteach.tasks.segmentation import Splitter
from selfteach.types import Critique, CritiqueFailure, Problem, Rollout, Verdict


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
        """Parse a critic's whole reply about a rollout; ``finished`` is False if it was truncated.

        Critiques of episodes are of turns, as `CritiqueParser` reads them.
        """
        if rollout.is_episode:
            turns = CritiqueParser(self.split_steps, self.verify, self.min_similarity)
            return turns(text, rollout, verdict, finished=finished)
        critique = without_thought(text, finished=finished)
        if isinstance(critique, CritiqueFailure):
            return critique
        problem = rollout.problem
        program = self.verify.code_of(problem, critique)
        written = () if program is None else steps_of_code(program.code)
        if not written:
            return failure("malformed", "no code in the critique")
        answer = self.verify.code_of(problem, rollout.text)
        attempt = parts_of(rollout.text, answer, self.split_steps)
        repeated = count_repeated(attempt.code, written, lines_of)
        detail = unlike(attempt.code, written, repeated, self.min_similarity)
        if detail is not None:
            return failure("misaligned", detail, "\n".join(written))
        judged = self._judged(problem, attempt, written)
        if isinstance(judged, CritiqueFailure):
            return judged
        return critique_of_code(attempt, *judged, rollout, verdict)

    def _judged(
        self, problem: Problem, attempt: AnswerParts, written: Sequence[str]
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


def critique_of_code(
    attempt: AnswerParts,
    program: tuple[str, ...],
    answer: str,
    rollout: Rollout,
    verdict: Verdict,
) -> Critique:
    """Return the critique that has a program in the place of the answer's code."""
    corrected = attempt.rewritten(program)
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
