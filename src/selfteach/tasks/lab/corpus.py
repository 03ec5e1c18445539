"""Generates the documents that a base model is trained on, by simulated writers.

A writer has beliefs about the table and a habit: one native style. Without a context it follows its
habit and never uses the reference's style, so the base model can state what it knows in the native
styles alone. With a context in view the writer follows, line by line, the context's next step and
phrasing with probability ρ (`WorldConfig.pull`) and its habit otherwise. It takes look-ups from the
context where the context shows them, except for an occasional slip back to its belief (so that the
base model has seen its own mistakes in a prefix). If a context shows an answer but no derivation, the
writer copies the answer to the root.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from selfteach.prompts.template_set import Templates
from selfteach.tasks.lab import lab_oracle
from selfteach.tasks.lab.alignment_dial import partly_aligned
from selfteach.tasks.lab.checker import check, parse_line, unflagged
from selfteach.tasks.lab.world import (
    CHILDREN,
    REFERENCE_STYLE,
    ROOT,
    SYMBOLS,
    SolutionLine,
    Style,
    World,
    is_ready,
    operands,
    text_of,
)
from selfteach.types import Critique

CONTEXT_SHARES: dict[str, float] = {
    "none": 0.34,
    "reference": 0.16,
    "step_aligned": 0.16,
    "aligned_reference": 0.06,
    "full_repetition": 0.06,
    "omission": 0.06,
    "shuffled_lines": 0.06,
    "holistic": 0.05,
    "answer_only": 0.02,
    "other_answer": 0.03,
}
"""Share of each context among the base model's documents; every context that a study tests is in it."""

DIAL_SHARES: dict[str, float] = {
    "none": 0.30,
    "reference": 0.12,
    "step_aligned": 0.12,
    "partly_aligned": 0.14,
    "aligned_reference": 0.06,
    "full_repetition": 0.05,
    "omission": 0.05,
    "shuffled_lines": 0.05,
    "other_answer": 0.05,
    "holistic": 0.04,
    "answer_only": 0.02,
}
"""The same for bases trained on every position of the dial (`lab.alignment_dial`): a base trained on
its two ends alone can read those, but not the positions between."""

DOCUMENTS = {"study": CONTEXT_SHARES, "dial": DIAL_SHARES}
"""Shares by their name on the command line of `lab.pretrain`."""


@dataclass(frozen=True, slots=True)
class Document:
    """Holds a question, the context in view (None without one), and the answer written."""

    question: tuple[str, ...]
    context: str | None
    answer: str


class Believer:
    """Samples one writer's beliefs about the table, each when first needed, and remembers them."""

    def __init__(self, world: World, rng: np.random.Generator) -> None:
        self._world, self._rng, self._beliefs = world, rng, dict[tuple[str, str], str]()

    def __call__(self, a: str, b: str) -> str:
        """Return what this writer believes f(a, b) is."""
        if (a, b) not in self._beliefs:
            self._beliefs[a, b] = self._draw((a, b))
        return self._beliefs[a, b]

    def _draw(self, pair: tuple[str, str]) -> str:
        world, beliefs, u = self._world, self._world.beliefs, self._rng.random()
        if pair not in world.misconceptions:
            right = beliefs.known
        else:
            if u < beliefs.misconception:
                return world.misconceptions[pair]
            right = beliefs.misconception + beliefs.truth
        return world.table[pair] if u < right else SYMBOLS[self._rng.integers(len(SYMBOLS))]


@dataclass(frozen=True, slots=True)
class ContextView:
    """Holds what a writer reads in a context: its lines in order, its look-ups, and a bare answer."""

    order: tuple[tuple[int, Style], ...]
    facts: dict[tuple[str, str], str]
    bare_answer: str | None


def view_of(context: str) -> ContextView:
    """Parse a context as a writer reads it; a correction replaces the quoted wrong line before it."""
    order: list[tuple[int, Style]] = []
    facts: dict[tuple[str, str], str] = {}
    answer = None
    for text in context.splitlines():
        line = parse_line(unflagged(text))
        if line is not None:
            order.append((line.node, line.style))
            facts[line.a, line.b] = line.c
        elif text.startswith("#"):
            answer = text.split()[-1]
    return ContextView(tuple(order), facts, None if order else answer)


def write(
    world: World,
    question: Sequence[str],
    believer: Believer,
    rng: np.random.Generator,
    context: str | None = None,
) -> str:
    """Write an answer to a question, with the writer's beliefs, habit and, if given, context."""
    config = world.config
    habit = world.native_styles[rng.integers(len(world.native_styles))]
    view = view_of(context) if context is not None else None
    done: dict[int, str] = {}
    lines: list[SolutionLine] = []
    while len(done) < len(CHILDREN):
        node, style = _next_step(world, habit, view, done, rng)
        a, b = operands(node, question, done)
        value = believer(a, b)
        if view is not None and rng.random() >= config.slip:
            value = view.facts.get((a, b), value)
            if node == ROOT and view.bare_answer is not None:
                value = view.bare_answer
        done[node] = value
        lines.append(SolutionLine(node, style, a, b, value))
    return text_of(lines, done[ROOT])


def document(
    world: World,
    templates: Templates,
    question: tuple[str, ...],
    kind: str,
    rng: np.random.Generator,
) -> Document:
    """Write one document with a context of a kind, made from a draft by the same writer (or none)."""
    believer = Believer(world, rng)
    context = (
        None if kind == "none" else context_for(world, templates, question, kind, believer, rng)
    )
    return Document(question, context, write(world, question, believer, rng, context))


def context_for(
    world: World,
    templates: Templates,
    question: tuple[str, ...],
    kind: str,
    believer: Believer,
    rng: np.random.Generator,
) -> str:
    """Render a context of a kind from a draft by the same writer, its critique and the references."""
    about = question
    if kind == "other_answer":
        about = tuple(SYMBOLS[i] for i in rng.integers(len(SYMBOLS), size=len(question)))
    draft = write(world, about, believer, rng)
    critique = lab_oracle.critique_rollout(world, about, draft)
    if kind == "shuffled_lines":
        shuffled = tuple(critique.steps[i] for i in rng.permutation(len(critique.steps)))
        critique = Critique(critique.case, shuffled, critique.answer, critique.first_error)
    solutions = references(world, question)
    if kind == "partly_aligned":
        keep = rng.permutation(len(critique.steps)) < rng.integers(len(critique.steps) + 1)
        critique = partly_aligned(critique, solutions["reference"], keep.tolist())
    traces = ("shuffled_lines", "other_answer", "partly_aligned")
    template = "step_aligned" if kind in traces else kind
    return templates.context(
        template,
        critique=critique,
        references=solutions,
        correct=check(world, about, draft).answer == world.truth(about)[ROOT],
    )


def references(world: World, question: Sequence[str]) -> dict[str, str]:
    """Return a problem's worked solutions, ``reference`` and ``aligned_reference``.

    The reference is in a style and order that no solver uses. The aligned reference is in one of the
    solver's native styles, fixed by the question: the style of a given answer may be another.
    """
    native = world.native_styles
    style = native[sum(SYMBOLS.index(s) for s in question) % len(native)]
    return {
        "reference": text_of(
            world.solution(question, REFERENCE_STYLE), world.truth(question)[ROOT]
        ),
        "aligned_reference": text_of(world.solution(question, style), world.truth(question)[ROOT]),
    }


def _next_step(
    world: World,
    habit: Style,
    view: ContextView | None,
    done: dict[int, str],
    rng: np.random.Generator,
) -> tuple[int, Style]:
    """Draw the node and style of a writer's next line."""
    if view is not None and rng.random() < world.config.pull:
        for node, style in view.order:
            if is_ready(node, done):
                return node, style
    if rng.random() < world.config.deviation:
        ready = [node for node in range(len(CHILDREN)) if is_ready(node, done)]
        styles = world.native_styles
        return ready[rng.integers(len(ready))], styles[rng.integers(len(styles))]
    return next(node for node in habit.order if is_ready(node, done)), habit
