"""Does a verifier accept each problem's own answer, and reject that answer corrupted?"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from selfteach.protocols import Verifier
from selfteach.types import Problem

DIGIT = re.compile(r"\d")
LETTER = re.compile(r"[A-Za-z](?=[^A-Za-z]*$)")


@dataclass(frozen=True, slots=True)
class MisjudgedAnswer:
    """A problem that its verifier cannot judge."""

    problem: Problem
    kind: Literal["rejected", "accepted"]
    """``rejected``: its own answer; ``accepted``: its answer corrupted."""
    answer: str
    """The one that was judged wrongly."""

    def __str__(self) -> str:
        told = self.answer if len(self.answer) <= 60 else self.answer[:60] + "…"
        what = "own answer" if self.kind == "rejected" else "corrupted answer"
        return f"problem {self.problem.id!r}: the {what} {told!r} is {self.kind}"


@dataclass(frozen=True, slots=True)
class Audit:
    """What the audit of a problem set came to."""

    checked: int
    without_answer: int
    """Problems that have no answer to try (some generators' many right answers)."""
    findings: tuple[MisjudgedAnswer, ...]

    @property
    def invalid_problems(self) -> frozenset[str]:
        """Questions of the problems that were found (ids may be the same in two files)."""
        return frozenset(finding.problem.question for finding in self.findings)


def audit(problems: Iterable[Problem], verify: Verifier, write: Callable[[str], str]) -> Audit:
    """Try every problem's own answer and one corruption of it; ``write`` states an answer as the
    verifier reads it.
    """
    checked = without = 0
    findings: list[MisjudgedAnswer] = []
    for problem in problems:
        if not problem.answer:
            without += 1
            continue
        checked += 1
        if not verify(problem, write(problem.answer)).correct:
            findings.append(MisjudgedAnswer(problem, "rejected", problem.answer))
        wrong = corrupt(problem.answer)
        if verify(problem, write(wrong)).correct:
            findings.append(MisjudgedAnswer(problem, "accepted", wrong))
    return Audit(checked, without, tuple(findings))


def corrupt(answer: str) -> str:
    """Another answer of the same form: its first digit one up (9 becomes 8), or its last letter the
    next in the alphabet (z becomes y), or a 1 behind it.

    The first digit, since scorers may forgive the last ones of a fraction.
    """
    if digit := DIGIT.search(answer):
        changed = "8" if digit[0] == "9" else str(int(digit[0]) + 1)
        return answer[: digit.start()] + changed + answer[digit.end() :]
    if letter := LETTER.search(answer):
        step = -1 if letter[0] in "zZ" else 1
        changed = chr(ord(letter[0]) + step)
        return answer[: letter.start()] + changed + answer[letter.end() :]
    return answer + "1"
