"""Audits a problem set: the verifier must accept each gold answer and reject corruptions of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from selfteach.protocols import Verifier
from selfteach.tasks.math_answers import read_answer
from selfteach.types import Problem

NUMBER = re.compile(r"[0-9]+(?:,[0-9]{3}(?![0-9]))*(?:[.][0-9]+)?")
LETTER = re.compile(r"[A-Za-z]")
SEPARATOR = re.compile(
    r"[()\[\]{}]|[,;](?![0-9]{3}(?![0-9]))|(?i:(?:\\text\{ *)?\b(?:and|or)\b *\}?)"
)
BRACKETS = re.compile(r"\A(?:\\left ?)?\\?[(\[{]|(?:\\right ?)?\\?[)\]}]\Z")
MAX_CORRUPTIONS = 12
"""Corruptions of one answer that are tried."""


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
        """Return the transcripts of the invalid problems: their questions, and what precedes them."""
        return frozenset(finding.problem.transcript for finding in self.findings)


def audit(
    problems: Iterable[Problem],
    verify: Verifier,
    write: Callable[[str], str],
    corrupted: Callable[[Problem], Iterable[str]] | None = None,
) -> Audit:
    """Verify every problem's gold answer and `corruptions` of it, until the first that is accepted.

    ``write`` turns an answer into a text that the verifier can read; ``corrupted`` returns other wrong
    answers to a problem.
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
        for wrong in corrupted(problem) if corrupted else corruptions(problem.answer):
            if verify(problem, write(wrong)).correct:
                findings.append(MisjudgedAnswer(problem, "accepted", wrong))
                break
    return Audit(checked, without, tuple(findings))


def corruptions(answer: str) -> Iterator[str]:
    """Yield other answers of the same form: each number changed in turn, each part alone.

    A number's first digit is increased (9 becomes 8): scorers may tolerate an error in the last digits
    of a fraction. Without a number the last letter is replaced by the next in the alphabet (z
    becomes y), or a 1 is appended. At most `MAX_CORRUPTIONS`, spread over the answer.
    """
    numbers = [match.start() for match in NUMBER.finditer(answer)]
    whole = "".join(answer.split())
    parts = [part for part in _parts(answer) if "".join(part.split()) not in ("", whole)]
    parts = parts if len(set(parts)) > 1 else []
    corrupted: list[int | str] = [*(numbers or [_without_numbers(answer)]), *parts]
    for index in range(min(len(corrupted), MAX_CORRUPTIONS)):
        chosen = corrupted[index * len(corrupted) // min(len(corrupted), MAX_CORRUPTIONS)]
        if isinstance(chosen, int):
            chosen = _with(answer, chosen, _other_digit(answer[chosen]))
        yield chosen


def _without_numbers(answer: str) -> str:
    letter = next(reversed(list(LETTER.finditer(answer))), None)
    if letter is None:
        return answer + "1"
    return _with(answer, letter.start(), chr(ord(letter[0]) + (-1 if letter[0] in "zZ" else 1)))


def _with(answer: str, at: int, character: str) -> str:
    return answer[:at] + character + answer[at + 1 :]


def _other_digit(digit: str) -> str:
    value = int(digit)
    return str(value - 1 if value == 9 else value + 1)


def _parts(answer: str) -> list[str]:
    """Return the quantities of an answer, or the elements of a list, a pair or a set."""
    quantities = read_answer(answer).parts
    if len(quantities) > 1:
        return [f"{part.formula} {part.words}" for part in quantities] + [
            part.formula for part in quantities
        ]
    bare = BRACKETS.sub("", answer.strip())
    parts, depth, begin = [], 0, 0
    for match in SEPARATOR.finditer(bare):
        depth += (match[0] in "([{") - (match[0] in ")]}")
        if depth <= 0 and match[0] not in "([{}])":
            parts.append(bare[begin : match.start()].strip())
            begin = match.end()
    return [*parts, bare[begin:].strip()] if parts else []
