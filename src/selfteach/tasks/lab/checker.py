"""Parses an answer of the lab and checks each of its steps against the world."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from selfteach.tasks.lab.world import (
    ANSWER_MARK,
    CHILDREN,
    FLAG,
    STYLE_OF_MARK,
    SolutionLine,
    Style,
    World,
    is_ready,
    operands,
)

STEP_START = re.compile(rf"(?:^|(?<=\s))(?=[0-{len(CHILDREN) - 1}]\s|{ANSWER_MARK}(?:\s|$))")
"""Matches where a step begins: at a node's number, or at the answer mark."""


NODES = {str(node): node for node in range(len(CHILDREN))}
"""Nodes by the text of their number."""


@dataclass(frozen=True, slots=True)
class CheckedStep:
    """Holds one step as written, and what is wrong with it."""

    text: str
    line: SolutionLine | None
    """None if the text is not a line of any style."""
    error: str | None
    """``form``, ``bookkeeping`` (a node twice or too early, operands not as derived) or ``value``
    (the look-up's result); None if the step is right."""


@dataclass(frozen=True, slots=True)
class CheckedAnswer:
    """Holds an answer's checked steps and its final symbol."""

    steps: tuple[CheckedStep, ...]
    answer: str | None

    @property
    def first_error(self) -> int | None:
        """Return the index of the first wrong step, None if every written step is right."""
        return next((i for i, step in enumerate(self.steps) if step.error), None)


def split(text: str) -> list[str]:
    """Split an answer into the texts of its steps; the answer line, if there is one, is the last."""
    return [piece.strip() for piece in STEP_START.split(text) if piece.strip()]


@lru_cache(maxsize=2**14)  # the lines of a world recur in most answers
def parse_line(text: str) -> SolutionLine | None:
    """Parse a step's text; None if it has not the form of a line."""
    words = text.split()
    if len(words) != 6 or words[0] not in NODES:
        return None
    style = STYLE_OF_MARK.get(words[1])
    if style is None or words[4] != style.marks[1]:
        return None
    a, b = (words[3], words[2]) if style.reversed_operands else (words[2], words[3])
    if not all(len(word) == 1 and word.isalpha() for word in (a, b, words[5])):
        return None
    return SolutionLine(NODES[words[0]], style, a, b, words[5])


def unflagged(text: str) -> str:
    """Restore a critic's flagged line to the phrasing of its style; other text is returned as it is."""
    words = text.split()
    if len(words) == 6 and words[4] == FLAG and words[1] in STYLE_OF_MARK:
        words[4] = STYLE_OF_MARK[words[1]].marks[1]
    return " ".join(words)


def parse_answer(text: str) -> str | None:
    """Return the symbol after the answer mark, or None."""
    match = re.search(rf"{ANSWER_MARK}\s+([a-z])\s*$", text)
    return match.group(1) if match else None


def check(world: World, question: Sequence[str], text: str) -> CheckedAnswer:
    """Check every step of an answer.

    A step is right if it derives the node's true value: a look-up that is itself correct but starts
    from an earlier wrong value counts as wrong, since the trace is no longer a derivation of the
    truth. The first error is therefore always where the answer first departs from the truth.
    """
    truth = world.truth(question)
    pieces = split(text)
    answer = parse_answer(pieces[-1]) if pieces else None
    steps: list[CheckedStep] = []
    done: dict[int, str] = {}
    for piece in pieces:
        if piece.startswith(ANSWER_MARK):
            continue
        line = parse_line(piece)
        error = "form" if line is None else _error(line, question, truth, done)
        steps.append(CheckedStep(piece, line, error))
        if line is not None:
            done.setdefault(line.node, line.c)
    return CheckedAnswer(tuple(steps), answer)


def style_of(steps: Sequence[CheckedStep], default: Style) -> Style:
    """Return the style of most of an answer's lines (on a tie the earliest), or a default."""
    styles = [step.line.style for step in steps if step.line is not None]
    counts = Counter(styles)  # in the order of their first lines
    return max(counts, key=lambda style: counts[style]) if counts else default


def _error(
    line: SolutionLine, question: Sequence[str], truth: Sequence[str], done: dict[int, str]
) -> str | None:
    if not is_ready(line.node, done):
        return "bookkeeping"
    if (line.a, line.b) != operands(line.node, question, done):
        return "bookkeeping"
    return None if line.c == truth[line.node] else "value"
