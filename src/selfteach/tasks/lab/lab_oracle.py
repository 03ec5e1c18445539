"""Critiques lab answers with a program that checks every step, and errs at a chosen rate."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from selfteach.tasks.lab.checker import CheckedAnswer, check, style_of
from selfteach.tasks.lab.world import ROOT, SYMBOLS, SolutionLine, World, is_ready, operands
from selfteach.types import Critique, CritiqueStep


def critique_rollout(
    world: World,
    question: Sequence[str],
    text: str,
    *,
    finished: bool = True,
    error_rate: float = 0.0,
    rng: np.random.Generator | None = None,
) -> Critique:
    """Repeat an answer's right steps verbatim, correct its earliest error, continue from there.

    The trace keeps the answer's style and, up to the error, its order; the corrected line is flagged
    and does not quote the wrong value. With probability ``error_rate`` the critic errs instead: it
    writes a wrong value at the first error (if no step needs a correction, at a random step) and
    continues from that value.
    """
    checked = check(world, question, text)
    error_at = None
    if error_rate > 0:
        assert rng is not None, "a critic that errs needs a random stream"
        if rng.random() < error_rate:
            error_at = checked.first_error
            if error_at is None or error_at > ROOT:
                error_at = int(rng.integers(min(max(len(checked.steps), 1), ROOT + 1)))
    return _trace(world, question, checked, finished, error_at, rng)


def _trace(
    world: World,
    question: Sequence[str],
    checked: CheckedAnswer,
    finished: bool,
    error_at: int | None,
    rng: np.random.Generator | None,
) -> Critique:
    truth = world.truth(question)
    style = style_of(checked.steps, world.native_styles[0])
    stop = checked.first_error if error_at is None else error_at
    prefix = checked.steps if stop is None else checked.steps[:stop]
    steps = [CritiqueStep(step.text, "kept", step.text) for step in prefix]
    done = {step.line.node: step.line.c for step in prefix if step.line is not None}

    # A wrong line after the root (a sixth one) has no correction: the trace ends before it.
    if stop is not None and len(done) <= ROOT:
        wrong = checked.steps[stop] if stop < len(checked.steps) else None
        node = _node_to_fix(wrong.line if wrong else None, style.order, done)
        line_style = wrong.line.style if wrong and wrong.line else style
        a, b = operands(node, question, done)
        c = world.table[a, b]
        if error_at is not None:
            assert rng is not None
            c = str(rng.choice([s for s in SYMBOLS if s != c]))
        done[node] = c
        line = SolutionLine(node, line_style, a, b, c, flagged=True)
        steps.append(CritiqueStep(str(line), "fixed", wrong.text if wrong else None))
    while len(done) <= ROOT:
        node = next(n for n in style.order if is_ready(n, done))
        a, b = operands(node, question, done)
        done[node] = world.table[a, b]
        steps.append(CritiqueStep(str(SolutionLine(node, style, a, b, done[node])), "new"))

    first_error = checked.first_error if error_at is None else error_at
    right = checked.answer == truth[ROOT]
    case = "C" if not finished else "D" if first_error is not None or not right else "A"
    return Critique(case, tuple(steps), done[ROOT], first_error)


def _node_to_fix(line: SolutionLine | None, order: Sequence[int], done: dict[int, str]) -> int:
    """Return the node of the wrong line if it is ready there, else the style's next node."""
    if line is not None and is_ready(line.node, done):
        return line.node
    return next(n for n in order if is_ready(n, done))
