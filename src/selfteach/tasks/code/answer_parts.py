"""Splits an answer at its code: the steps of the program, and the lines before and after it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import takewhile

from selfteach.tasks.code.answer_code import AnswerCode
from selfteach.tasks.code.code_steps import statement_lines
from selfteach.tasks.final_answers import Span

FENCE_LINE = re.compile(r"\s{0,3}(`{3,}|~{3,})")
CLOSING = re.compile(r"\s*(?:`{3,}|~{3,}|</answer>)")
"""Matches a line that ends the code of an answer, and belongs to it."""


@dataclass(frozen=True, slots=True)
class AnswerParts:
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
        fence = FENCE_LINE.match(self.before[-1]) if self.before and not lines else None
        return (fence[1],) if fence else lines

    def rewritten(self, program: tuple[str, ...]) -> tuple[str, ...]:
        """Return the steps of the answer with a program in the place of its code.

        What the answer says after its code is left out if the program is another one.
        """
        if not self.code:
            return ("```python", *program, "```")
        if [*map(lines_of, program)] == [*map(lines_of, self.code)]:
            return self.before + self.code + (self.after or self.closing)
        return self.before + program + self.closing


def parts_of(
    text: str, answer: AnswerCode | None, split_steps: Callable[[str], list[Span]]
) -> AnswerParts:
    """Split an answer's steps at its code."""
    spans = [span for span in split_steps(text) if span[0] < span[1]]
    begin = len(text) if answer is None else answer.begin
    end = begin + (0 if answer is None else len(answer.code))
    return AnswerParts(
        tuple(text[a:b].rstrip() for a, b in spans if a < begin),
        tuple(text[a:b].rstrip() for a, b in spans if begin <= a < end),
        tuple(text[a:b].rstrip() for a, b in spans if a >= max(begin, end)),
    )


def steps_of_code(code: str) -> tuple[str, ...]:
    """Return the steps of a program, with their indentation."""
    return tuple(code[a:b].rstrip() for a, b in statement_lines(code))


def lines_of(code: str) -> list[str]:
    """Return the lines of a step of code without white space at their ends; indentation counts."""
    return [line.rstrip() for line in code.rstrip().split("\n")]
