"""Interpolates between the critique of an answer and the reference solution: the alignment dial.

Every position of the dial shows the same true look-ups. What changes is the share of steps that keep
the answer's phrasing and position; the others have the reference's phrasing and order. So a curve over
the dial separates alignment from information.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from selfteach.tasks.lab.checker import parse_line, unflagged
from selfteach.tasks.lab.world import ANSWER_MARK, SolutionLine, is_ready
from selfteach.types import Critique, CritiqueStep


def partly_aligned(critique: Critique, reference: str, keep: Sequence[bool]) -> Critique:
    """Replace the critique's steps that are not in ``keep`` by the reference's steps.

    ``keep`` has one entry per step of the critique. All True: the critique's trace (`step_aligned`).
    All False: the reference. In between a retained step stays in its position wherever the tree of
    look-ups allows, and the rest follow in the reference's order, so that each line's operands are
    derived before it.
    """
    lines = [_line(step.text) for step in critique.steps]
    steps = {line.node: step for line, step in zip(lines, critique.steps, strict=True)}
    replacements = {_line(text).node: CritiqueStep(text, "new") for text in _lines(reference)}
    retained = {line.node for line, keeps in zip(lines, keep, strict=True) if keeps}
    done: dict[int, str] = {}
    mixed: list[CritiqueStep] = []
    for slot in range(len(lines)):
        due = [line.node for line in lines[: slot + 1] if line.node in retained]
        replaced = [node for node in replacements if node not in retained]
        not_due = [line.node for line in lines[slot + 1 :] if line.node in retained]
        node = next(node for node in (*due, *replaced, *not_due) if is_ready(node, done))
        mixed.append(steps[node] if node in retained else replacements[node])
        done[node] = ""
    return replace(critique, steps=tuple(mixed))


def _lines(solution: str) -> list[str]:
    return [text for text in solution.splitlines() if not text.startswith(ANSWER_MARK)]


def _line(text: str) -> SolutionLine:
    line = parse_line(unflagged(text))
    assert line is not None, f"not a line of the lab: {text!r}"
    return line
