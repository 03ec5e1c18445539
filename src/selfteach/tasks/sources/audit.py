"""Audits a problem set: the verifier must accept each gold answer and reject it corrupted."""

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
    """Describes an answer that the verifier misjudges; its problem is invalid."""

    problem: Problem
    kind: Literal["rejected", "accepted"]
    """``rejected``: the gold answer; ``accepted``: the gold answer corrupted."""
    answer: str
    """The answer that was misjudged."""

    def __str__(self) -> str:
        shown = self.answer if len(self.answer) <= 60 else self.answer[:60] + "…"
        what = "gold answer" if self.kind == "rejected" else "corrupted answer"
        return f"problem {self.problem.label!r}: the verifier {self.kind} the {what} {shown!r}"


@dataclass(frozen=True, slots=True)
class Audit:
    """Holds the result of the audit of a problem set."""

    checked: int
    """Number of problems whose answer was tried."""
    without_answer: int
    """Number of problems without a gold answer (of generators with many right answers)."""
    findings: tuple[MisjudgedAnswer, ...]

    @property
    def invalid_problems(self) -> frozenset[str]:
        """Return the questions of the invalid problems (ids may repeat across files)."""
        return frozenset(finding.problem.question for finding in self.findings)


def audit(problems: Iterable[Problem], verify: Verifier, write: Callable[[str], str]) -> Audit:
    """Verify every problem's gold answer and one corruption of it.

    ``write`` turns an answer into a text that the verifier can read.
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
    """Return another answer of the same form.

    Its first digit is increased (9 becomes 8), or its last letter is replaced by the next in the
    alphabet (z becomes y), or a 1 is appended. The first digit, since scorers may tolerate an error in
    the last digits of a fraction.
    """
    if digit := DIGIT.search(answer):
        changed = "8" if digit[0] == "9" else str(int(digit[0]) + 1)
        return answer[: digit.start()] + changed + answer[digit.end() :]
    if letter := LETTER.search(answer):
        step = -1 if letter[0] in "zZ" else 1
        changed = chr(ord(letter[0]) + step)
        return answer[: letter.start()] + changed + answer[letter.end() :]
    return answer + "1"
