"""The dial of alignment: a context between the critique of an answer and the reference solution.

Every position of the dial shows the same true look-ups. What changes is the share of steps that keep
the answer's own words and place; the others stand in the reference's words and order. So a curve over
the dial separates alignment from information.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from selfteach.tasks.lab.checker import parse_line, unflagged
from selfteach.tasks.lab.world import ANSWER_MARK, SolutionLine, is_ready
from selfteach.types import Critique, CritiqueStep


def partly_aligned(critique: Critique, reference: str, kept: Sequence[bool]) -> Critique:
    """The critique with its steps that are ``kept`` as they stand, and the reference's in their place.

    ``kept`` has one entry per step of the critique. All kept: the critique's trace (`step_aligned`).
    None kept: the reference. In between a kept step has its own place wherever the tree of look-ups
    allows, and the rest follow in the reference's order, so that each line's operands are known.
    """
    own = [_line(step.text) for step in critique.steps]
    steps = {line.node: step for line, step in zip(own, critique.steps, strict=True)}
    theirs = {_line(text).node: CritiqueStep(text, "new") for text in _lines(reference)}
    keep = {line.node for line, keeps in zip(own, kept, strict=True) if keeps}
    done: dict[int, str] = {}
    shown: list[CritiqueStep] = []
    for slot in range(len(own)):
        due = [line.node for line in own[: slot + 1] if line.node in keep]
        others = [node for node in theirs if node not in keep]
        later = [line.node for line in own[slot + 1 :] if line.node in keep]
        node = next(node for node in (*due, *others, *later) if is_ready(node, done))
        shown.append(steps[node] if node in keep else theirs[node])
        done[node] = ""
    return replace(critique, steps=tuple(shown))


def _lines(solution: str) -> list[str]:
    return [text for text in solution.splitlines() if not text.startswith(ANSWER_MARK)]


def _line(text: str) -> SolutionLine:
    line = parse_line(unflagged(text))
    assert line is not None, f"not a line of the lab: {text!r}"
    return line
