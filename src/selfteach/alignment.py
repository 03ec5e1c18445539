"""Critique steps against answer steps: how far an answer is repeated verbatim, and where that ends."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from selfteach.steps import Span, content
from selfteach.types import Critique, FirstChange, Marked


def first_change(
    marked: Marked, spans: Sequence[Span], token_ends: Sequence[int]
) -> FirstChange | None:
    """Compare an answer's steps, white space apart, with its critique's, in order.

    ``spans`` are the steps in the answer's text, the final answer last if it has one; ``token_ends``
    says where each of its tokens ends in the text. The final answer is repeated if the verifier
    reads the same one in both. None without a critique.
    """
    critique, text, parsed = marked.critique, marked.rollout.text, marked.verdict.parsed
    if not isinstance(critique, Critique):
        return None
    steps = [step.text for step in critique.steps]
    for index, span in enumerate(spans):
        own = content(text, span)
        final = index == len(spans) - 1 and parsed is not None
        if final and parsed == critique.answer:
            continue
        told = steps[index] if index < len(steps) and not final else ""
        if same_words(own, told):
            continue
        begin = text.index(own, span[0]) if own else span[0]
        changed_at = begin + _common_length(own, told) if told else span[0]
        token = min(bisect_right(token_ends, changed_at), len(token_ends) - 1)
        return FirstChange(index, token, token / len(token_ends))
    return FirstChange(None, None, 1.0)


def same_words(a: str, b: str) -> bool:
    """Equal but for white space."""
    return a.split() == b.split()


def _common_length(a: str, b: str) -> int:
    shorter = min(len(a), len(b))
    return next((i for i in range(shorter) if a[i] != b[i]), shorter)
