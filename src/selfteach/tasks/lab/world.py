"""Generates a world: a random table, the beliefs of writers about it, and problems to solve with it.

A problem is six symbols. Its answer is the root of a fixed tree of five table look-ups::

    n0 = f(x0, x1)   n1 = f(x2, x3)   n2 = f(n0, n1)   n3 = f(x4, x5)   n4 = f(n2, n3)

A solution is one line per node, in any order that respects the tree, in one of several styles::

    plus   (native)     0 + a b = c      canonical order 0 1 2 3 4
    minus  (native)     0 - a b > c      order 3 1 0 2 4
    angle  (reference)  0 < b a : c      order 1 0 3 2 4, operands reversed

and then the answer: ``# c``. The node is the first word and the phrasing mark the second, because with
the mark further on in the line the model's errors are of bookkeeping instead of knowledge.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from selfteach.config.data_section import SplitName

SYMBOLS = "abcdefghijklmnop"
ANSWER_MARK = "#"
FLAG = "!"

CHILDREN: tuple[tuple[str, str], ...] = (
    ("x0", "x1"),
    ("x2", "x3"),
    ("n0", "n1"),
    ("x4", "x5"),
    ("n2", "n3"),
)
"""Operands of each node: ``x`` a symbol of the question, ``n`` the value of another node."""
ROOT = len(CHILDREN) - 1
OPERANDS = tuple(tuple((name[0] == "x", int(name[1])) for name in pair) for pair in CHILDREN)
"""The same, parsed: whether an operand is the question's, and its index there or its node."""


@dataclass(frozen=True, slots=True)
class Style:
    """Describes how a solution is written: the order of its nodes and the phrasing of each line."""

    name: str
    order: tuple[int, ...]
    marks: tuple[str, str]
    reversed_operands: bool = False


STYLES: dict[str, Style] = {
    "plus": Style("plus", (0, 1, 2, 3, 4), ("+", "=")),
    "minus": Style("minus", (3, 1, 0, 2, 4), ("-", ">")),
    "angle": Style("angle", (1, 0, 3, 2, 4), ("<", ":"), reversed_operands=True),
}
REFERENCE_STYLE = STYLES["angle"]
STYLE_OF_MARK = {style.marks[0]: style for style in STYLES.values()}


@dataclass(frozen=True, slots=True)
class SolutionLine:
    """Holds one solution step: the value of ``node`` is f(``a``, ``b``) = ``c``."""

    node: int
    style: Style
    a: str
    b: str
    c: str
    flagged: bool = False
    """True for a critic's correction: the second mark becomes ``!``."""

    def __str__(self) -> str:
        first, second = self.style.marks
        operands = f"{self.b} {self.a}" if self.style.reversed_operands else f"{self.a} {self.b}"
        return f"{self.node} {first} {operands} {FLAG if self.flagged else second} {self.c}"


@dataclass(frozen=True, slots=True)
class Beliefs:
    """Describes how often writers are wrong about the table's weak facts.

    A writer believes each weak fact's fixed misconception with probability ``misconception``, the
    truth with ``truth``, anything else with the rest; other facts are right with ``known``.
    """

    misconception: float
    truth: float
    known: float = 0.99


BELIEFS: dict[str, Beliefs] = {
    # Confident errors, the truth almost outside the solver's support: hard problems.
    "hard": Beliefs(misconception=0.80, truth=0.06),
    # The truth is often sampled: the regime in which outcome rewards suffice.
    "easy": Beliefs(misconception=0.46, truth=0.40),
}


@dataclass(frozen=True, slots=True)
class WorldConfig:
    """Holds all settings of a world.

    ``pull`` (ρ) is the share of lines in which a writer with a context in view follows the context's
    next step and phrasing instead of its habit: the pull of style.
    """

    seed: int = 0
    weak_share: float = 0.30
    beliefs: str = "hard"
    native_styles: tuple[str, ...] = ("plus", "minus")
    pull: float = 0.5
    deviation: float = 0.1
    """Share of lines that deviate from the habit: any node that is ready, any native style."""
    slip: float = 0.1
    """Share of lines in which a writer with a context uses its belief instead of the context."""


@dataclass(frozen=True)
class World:
    """Holds a table and its weak facts with their misconceptions, and yields disjoint problem sets."""

    config: WorldConfig = field(default_factory=WorldConfig)
    table: Mapping[tuple[str, str], str] = field(init=False)
    misconceptions: Mapping[tuple[str, str], str] = field(init=False)

    def __post_init__(self) -> None:
        rng = np.random.default_rng([self.config.seed, 0])
        pairs = [(a, b) for a in SYMBOLS for b in SYMBOLS]
        table = {pair: SYMBOLS[rng.integers(len(SYMBOLS))] for pair in pairs}
        weak = rng.permutation(len(pairs))[: round(self.config.weak_share * len(pairs))]
        wrong = {}
        for index in sorted(weak):
            others = [s for s in SYMBOLS if s != table[pairs[index]]]
            wrong[pairs[index]] = others[rng.integers(len(others))]
        object.__setattr__(self, "table", table)
        object.__setattr__(self, "misconceptions", wrong)

    @property
    def beliefs(self) -> Beliefs:
        """Return how often this world's writers are wrong."""
        return BELIEFS[self.config.beliefs]

    @property
    def native_styles(self) -> tuple[Style, ...]:
        """Return the solver's styles; each answer is in one of them."""
        return tuple(STYLES[name] for name in self.config.native_styles)

    def truth(self, question: Sequence[str]) -> tuple[str, ...]:
        """Compute the five node values of a question, n0 … n4; the last is the answer."""
        values: list[str] = []
        for node in range(len(CHILDREN)):
            values.append(self.table[operands(node, question, values)])
        return tuple(values)

    def author_solve_rate(self, question: Sequence[str]) -> float:
        """Compute the probability that a writer without a context believes all of the solution."""
        values, chance = self.truth(question), 1.0
        for node in range(len(CHILDREN)):
            weak = operands(node, question, values) in self.misconceptions
            chance *= self.beliefs.truth if weak else self.beliefs.known
        return chance

    def solution(self, question: Sequence[str], style: Style) -> list[SolutionLine]:
        """Return the true solution in a style."""
        values = self.truth(question)
        lines = []
        for node in style.order:
            a, b = operands(node, question, values)
            lines.append(SolutionLine(node, style, a, b, values[node]))
        return lines

    def questions(self, split: SplitName, seed: int | None = None) -> Iterator[tuple[str, ...]]:
        """Yield an endless stream of distinct questions of one split.

        A question's split is a hash of its text, so splits are disjoint whatever the stream's seed: no
        training data, the base model's documents included, shares a question with validation or test.
        """
        key = {"train": 1, "validation": 2, "test": 3}[split]
        rng = np.random.default_rng([self.config.seed, key, *([] if seed is None else [seed])])
        seen: set[tuple[str, ...]] = set()
        while True:
            question = tuple(SYMBOLS[i] for i in rng.integers(len(SYMBOLS), size=6))
            if split_of(question) == split and question not in seen:
                seen.add(question)
                yield question


def operands(
    node: int, question: Sequence[str], values: Mapping[int, str] | Sequence[str]
) -> tuple[str, str]:
    """Return the operand pair of a node, given the question and the values of its children."""
    (in_question_a, a), (in_question_b, b) = OPERANDS[node]
    return question[a] if in_question_a else values[a], question[b] if in_question_b else values[b]


def is_ready(node: int, done: Mapping[int, str]) -> bool:
    """Return True if a node is not written yet and all its children are."""
    return node not in done and all(
        in_question or child in done for in_question, child in OPERANDS[node]
    )


def split_of(question: Sequence[str]) -> SplitName:
    """Return the split of a question: one in eight is validation, one in eight test."""
    digest = hashlib.blake2b(" ".join(question).encode(), digest_size=2).digest()
    match digest[0] % 8:
        case 0:
            return "validation"
        case 1:
            return "test"
        case _:
            return "train"


def text_of(lines: Sequence[SolutionLine], answer: str | None) -> str:
    """Format lines and answer as text, one step per line."""
    tail = [] if answer is None else [f"{ANSWER_MARK} {answer}"]
    return "\n".join([*map(str, lines), *tail])
