"""The dial of alignment: a context between the critique of an answer and the reference solution.

Every position of the dial shows the same true look-ups. What changes is the share of steps that keep
the answer's own words and place; the others stand in the reference's words and order. So a curve over
the dial separates alignment from information.
"""

from __future__ import annotations

from collections.abc import Sequence

from selfteach.lab.checker import parse_line, unflagged
from selfteach.lab.world import ANSWER_MARK, Line, is_ready
from selfteach.types import Critique


def partly_aligned(critique: Critique, reference: str, kept: Sequence[bool]) -> str:
    """A derivation in which the steps of the critique that are ``kept`` stand as they stand there.

    ``kept`` has one entry per step of the critique. All kept: the critique's trace (`step_aligned`).
    None kept: the reference. In between a kept step has its own place wherever the tree of look-ups
    allows, and the rest follow in the reference's order, so that each line's operands are known.
    """
    own = [_line(step.text) for step in critique.steps]
    texts = {line.node: step.text for line, step in zip(own, critique.steps, strict=True)}
    theirs = {line.node: text for text in _steps(reference) for line in [_line(text)]}
    keep = {line.node for line, keeps in zip(own, kept, strict=True) if keeps}
    done: dict[int, str] = {}
    shown: list[str] = []
    for slot in range(len(own)):
        due = [line.node for line in own[: slot + 1] if line.node in keep]
        others = [node for node in theirs if node not in keep]
        later = [line.node for line in own[slot + 1 :] if line.node in keep]
        node = next(node for node in (*due, *others, *later) if is_ready(node, done))
        shown.append(texts[node] if node in keep else theirs[node])
        done[node] = ""
    return "\n".join([*shown, f"{ANSWER_MARK} {critique.answer}"])


def _steps(solution: str) -> list[str]:
    return [text for text in solution.splitlines() if not text.startswith(ANSWER_MARK)]


def _line(text: str) -> Line:
    line = parse_line(unflagged(text))
    assert line is not None, f"not a line of the lab: {text!r}"
    return line
