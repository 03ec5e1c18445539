"""Align critiques with rollouts: how far a rollout is repeated verbatim, and where that ends."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence

from selfteach.tasks.segmentation import Span, content
from selfteach.types import Critique, CritiquedRollout, FirstChange


def first_change(
    critiqued: CritiquedRollout, spans: Sequence[Span], token_ends: Sequence[int]
) -> FirstChange | None:
    """Return where a rollout's first changed step begins to differ from its critique.

    ``spans`` are as in `changed_steps`; ``token_ends`` holds the end of each of the rollout's tokens as
    an offset into its text. None without a critique.
    """
    if not isinstance(critiqued.critique, Critique):
        return None
    text = critiqued.rollout.text
    for index, replacement in changed_steps(critiqued, spans):
        span, step = spans[index], content(text, spans[index])
        begin = text.index(step, span[0]) if step else span[0]
        changed_at = begin + _common_length(step, replacement) if replacement else span[0]
        token = min(bisect_right(token_ends, changed_at), len(token_ends) - 1)
        return FirstChange(index, token, token / len(token_ends))
    return FirstChange(None, None, 1.0)


def changed_steps(critiqued: CritiquedRollout, spans: Sequence[Span]) -> Iterator[tuple[int, str]]:
    """Yield the index of each step that the critique does not repeat, and the text in its place.

    Steps are compared in order, ignoring white space. ``spans`` are the steps of the rollout's text,
    the final answer last if it has one; that counts as repeated if the verifier parses the same answer
    from both. The text is "" where the critique has no step in that place. Yields nothing without a
    critique.
    """
    critique, text, parsed = critiqued.critique, critiqued.rollout.text, critiqued.verdict.parsed
    if not isinstance(critique, Critique):
        return
    steps = [step.text for step in critique.steps]
    for index, span in enumerate(spans):
        final = index == len(spans) - 1 and parsed is not None
        if final and parsed == critique.answer:
            continue
        replacement = steps[index] if index < len(steps) and not final else ""
        if not same_words(content(text, span), replacement):
            yield index, replacement


def same_words(a: str, b: str) -> bool:
    """Return True if two texts are equal except for white space."""
    return a.split() == b.split()


def _common_length(a: str, b: str) -> int:
    shorter = min(len(a), len(b))
    return next((i for i in range(shorter) if a[i] != b[i]), shorter)


def first_error_token(critique: object, step_spans: Sequence[tuple[int, int]]) -> int | None:
    """Return the token at which the first wrong step begins; ``step_spans`` are in tokens.

    None without a critique, without an error, or if the wrong step is not among the spans.
    """
    if not isinstance(critique, Critique) or critique.first_error is None:
        return None
    index = critique.first_error
    return step_spans[index][0] if index < len(step_spans) else None
