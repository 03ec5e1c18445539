"""The writers whose documents the base model learns from: habits, beliefs, and the pull of style.

One process writes everything. Alone, a writer follows the habit of one native style and never uses
the reference's: what it knows, it knows in its own words. With a context
in view the writer follows, line by line, the context's next step and phrasing with probability ρ
(`WorldConfig.pull`) and the own habit otherwise, and takes look-ups from the context where it shows
them, except for a slip now and then back to the old belief (so that a teacher has seen its own
mistake standing in the prefix). A context that shows an answer but no derivation of it has its
answer copied to the root.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from selfteach.prompts.template_set import Templates
from selfteach.tasks.lab import lab_oracle
from selfteach.tasks.lab.alignment_dial import partly_aligned
from selfteach.tasks.lab.checker import CheckedStep, check, parse_line, unflagged
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
"""Share of each context among the base model's documents: every context a study tests is readable."""

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
"""The same for bases that are shown every position of the dial (`lab.dial`): a base that has seen
only its ends reads them, but not what lies between."""

DOCUMENTS = {"study": CONTEXT_SHARES, "dial": DIAL_SHARES}
"""Shares by the name that `lab.pretrain` gives them."""


@dataclass(frozen=True, slots=True)
class Document:
    """A question, what was in view, and what was written."""

    question: tuple[str, ...]
    context: str | None
    answer: str


class Believer:
    """One writer's beliefs about the table, consistent within a document, drawn when first needed."""

    def __init__(self, world: World, rng: np.random.Generator) -> None:
        self._world, self._rng, self._held = world, rng, dict[tuple[str, str], str]()

    def __call__(self, a: str, b: str) -> str:
        """What this writer thinks f(a, b) is."""
        if (a, b) not in self._held:
            self._held[a, b] = self._draw((a, b))
        return self._held[a, b]

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
class View:
    """What a writer takes from a context: lines in order, look-ups, and a bare answer."""

    order: tuple[tuple[int, Style], ...]
    facts: dict[tuple[str, str], str]
    bare_answer: str | None


def view_of(context: str) -> View:
    """Read a context as its writers do; a quoted wrong line gives way to the correction after it."""
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
    return View(tuple(order), facts, None if order else answer)


def write(
    world: World,
    question: Sequence[str],
    believer: Believer,
    rng: np.random.Generator,
    context: str | None = None,
) -> str:
    """Write an answer to a question, with or without a context in view."""
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
    """One document of a kind: a draft is criticised where the kind needs it, then revised."""
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
    """The context of a kind, around a draft by the same writer."""
    about = question
    if kind == "other_answer":
        about = tuple(SYMBOLS[i] for i in rng.integers(len(SYMBOLS), size=len(question)))
    draft = write(world, about, believer, rng)
    critique = lab_oracle.criticise(world, about, draft)
    if kind == "shuffled_lines":
        shuffled = tuple(critique.steps[i] for i in rng.permutation(len(critique.steps)))
        critique = Critique(critique.case, shuffled, critique.answer, critique.first_error)
    known = references(world, question)
    if kind == "partly_aligned":
        kept = rng.permutation(len(critique.steps)) < rng.integers(len(critique.steps) + 1)
        critique = partly_aligned(critique, known["reference"], kept.tolist())
    traces = ("shuffled_lines", "other_answer", "partly_aligned")
    template = "step_aligned" if kind in traces else kind
    return templates.context(
        template,
        critique=critique,
        references=known,
        correct=check(world, about, draft).answer == world.truth(about)[ROOT],
    )


def references(world: World, question: Sequence[str]) -> dict[str, str]:
    """The worked solutions that a problem comes with.

    The reference is in a style and order that no solver uses. The aligned reference is in one of the
    solver's native styles, fixed by the question: it cannot know which one an answer will take.
    """
    native = world.native_styles
    style = native[sum(SYMBOLS.index(s) for s in question) % len(native)]
    return {
        "reference": text_of(
            world.solution(question, REFERENCE_STYLE), world.truth(question)[ROOT]
        ),
        "aligned_reference": text_of(world.solution(question, style), world.truth(question)[ROOT]),
    }


def error_kinds(steps: Sequence[CheckedStep]) -> list[str]:
    """The kinds of error in an answer's steps."""
    return [step.error for step in steps if step.error]


def _next_step(
    world: World, habit: Style, view: View | None, done: dict[int, str], rng: np.random.Generator
) -> tuple[int, Style]:
    if view is not None and rng.random() < world.config.pull:
        for node, style in view.order:
            if is_ready(node, done):
                return node, style
    if rng.random() < world.config.deviation:
        ready = [node for node in range(len(CHILDREN)) if is_ready(node, done)]
        styles = world.native_styles
        return ready[rng.integers(len(ready))], styles[rng.integers(len(styles))]
    return next(node for node in habit.order if is_ready(node, done)), habit
