"""Critique steps against answer steps: how far an answer is repeated verbatim, and where that ends."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence

from selfteach.tasks.segmentation import Span, content
from selfteach.types import Critique, CritiquedRollout, FirstChange


def first_change(
    critiqued: CritiquedRollout, spans: Sequence[Span], token_ends: Sequence[int]
) -> FirstChange | None:
    """Where an answer's first step begins to differ from its critique's; see `changed_steps`.

    ``token_ends`` says where each of the answer's tokens ends in its text. None without a critique.
    """
    if not isinstance(critiqued.critique, Critique):
        return None
    text = critiqued.rollout.text
    for index, told in changed_steps(critiqued, spans):
        span, own = spans[index], content(text, spans[index])
        begin = text.index(own, span[0]) if own else span[0]
        changed_at = begin + _common_length(own, told) if told else span[0]
        token = min(bisect_right(token_ends, changed_at), len(token_ends) - 1)
        return FirstChange(index, token, token / len(token_ends))
    return FirstChange(None, None, 1.0)


def changed_steps(critiqued: CritiquedRollout, spans: Sequence[Span]) -> Iterator[tuple[int, str]]:
    """The steps of an answer that its critique does not repeat, and what it says in their places.

    Steps are compared in order, white space apart. ``spans`` are those of the answer's text, the
    final answer last if it has one; that is repeated if the verifier reads the same one in both. A
    step with nothing in its place has "". Nothing without a critique.
    """
    critique, text, parsed = critiqued.critique, critiqued.rollout.text, critiqued.verdict.parsed
    if not isinstance(critique, Critique):
        return
    steps = [step.text for step in critique.steps]
    for index, span in enumerate(spans):
        final = index == len(spans) - 1 and parsed is not None
        if final and parsed == critique.answer:
            continue
        told = steps[index] if index < len(steps) and not final else ""
        if not same_words(content(text, span), told):
            yield index, told


def same_words(a: str, b: str) -> bool:
    """Equal but for white space."""
    return a.split() == b.split()


def _common_length(a: str, b: str) -> int:
    shorter = min(len(a), len(b))
    return next((i for i in range(shorter) if a[i] != b[i]), shorter)


def first_error_token(lesson_critique: object, step_spans: Sequence[tuple[int, int]]) -> int | None:
    """Where the first wrong step begins, from a critique and the answer's steps in tokens."""
    if not isinstance(lesson_critique, Critique) or lesson_critique.first_error is None:
        return None
    index = lesson_critique.first_error
    return step_spans[index][0] if index < len(step_spans) else None
