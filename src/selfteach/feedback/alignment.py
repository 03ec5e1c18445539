"""Align critiques with rollouts: how far a rollout is repeated verbatim, and where that ends."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence

from selfteach.prompts.template_set import untagged
from selfteach.tasks.code.answer_parts import lines_of
from selfteach.tasks.code.code_steps import IndentedSpan
from selfteach.tasks.segmentation import Span, before_answer, content
from selfteach.types import Critique, CritiquedRollout, FirstChange, Rollout


def first_change(
    critiqued: CritiquedRollout, spans: Sequence[Span], token_ends: Sequence[int]
) -> FirstChange | None:
    """Return where a rollout begins to differ from its critique.

    That is in the first changed step, or where the rollout says something outside its steps, which no
    critique repeats: all of an answer without steps. A thought is not shown to a critic, so its tokens
    do not count, and neither do an environment's. ``spans`` are as in `changed_steps`; ``token_ends``
    holds the end of each of the rollout's tokens as an offset into its text. None without a critique.
    """
    rollout = critiqued.rollout
    if not isinstance(critiqued.critique, Critique):
        return None
    changes = (
        (index, _changed_at(rollout.text, spans[index], replacement))
        for index, replacement in changed_steps(critiqued, spans)
    )
    places = [next(changes, None), _outside_steps(_without_environment(rollout), spans)]
    begun = bisect_right(token_ends, 0)
    if not any(places):
        return FirstChange(None, None, 1.0)
    step, changed_at = min((p for p in places if p is not None), key=lambda place: place[1])
    token = max(0, min(bisect_right(token_ends, changed_at), len(token_ends) - 1))
    repeated = _model_tokens(rollout, begun, token)
    fidelity = repeated / max(1, _model_tokens(rollout, begun, len(token_ends)))
    return FirstChange(step, token, fidelity)


def _model_tokens(rollout: Rollout, start: int, stop: int) -> int:
    """Count the tokens in a range that are not an environment's."""
    others = (segment for segment in rollout.segments if segment.kind == "environment")
    overlaps = (min(stop, other.stop) - max(start, other.start) for other in others)
    return max(0, stop - start - sum(overlap for overlap in overlaps if overlap > 0))


def _without_environment(rollout: Rollout) -> str:
    """Return a rollout's text with blanks for what an environment wrote: no step of the policy's."""
    text = rollout.text
    for start, stop in rollout.environment_spans:
        text = text[:start] + " " * (stop - start) + text[stop:]
    return text


def _changed_at(text: str, span: Span, replacement: str) -> int:
    """Return the first character of a step that differs from what the critique has in its place."""
    step = content(text, span)
    if not replacement:
        return span[0]
    begin = text.index(step, span[0]) if step else span[0]
    return begin + _common_length(step, replacement)


def _outside_steps(text: str, spans: Sequence[Span]) -> tuple[int, int] | None:
    """Return the first text outside the steps, as the index of the next step and the character.

    An empty rollout has it at its beginning: nothing of it is repeated.
    """
    at = 0
    for index, (start, stop) in enumerate((*spans, (len(text), len(text)))):
        if gap := text[at:start].strip():
            return index, text.index(gap, at)
        at = stop
    return None if spans else (0, 0)


def changed_steps(critiqued: CritiquedRollout, spans: Sequence[Span]) -> Iterator[tuple[int, str]]:
    """Yield the index of each step that the critique does not repeat, and the text in its place.

    Steps are compared in order, ignoring white space; turns and lines of code exactly, but for what
    their lines end in. ``spans`` are the steps of the rollout's text, the final answer last if it has
    one; that counts as repeated if the verifier parses the same answer from both. The text is "" where
    the critique has no step in that place. Yields nothing without a critique.
    """
    critique, rollout, verdict = critiqued.critique, critiqued.rollout, critiqued.verdict
    if not isinstance(critique, Critique):
        return
    steps = [step.text for step in critique.steps]
    before_final = len(before_answer(rollout, verdict, spans))
    for index, span in enumerate(spans):
        final = index >= before_final
        if final and verdict.parsed == critique.answer:
            continue
        replacement = steps[index] if index < len(steps) and not final else ""
        same = same_lines if isinstance(span, IndentedSpan) else same_words
        same = same_turns if rollout.is_episode else same
        if not same(content(rollout.text, span), replacement):
            yield index, replacement


def words_of(text: str) -> Sequence[str]:
    """Return the words of a text: steps are equal if theirs are."""
    return text.split()


def same_words(a: str, b: str) -> bool:
    """Return True if two texts are equal except for white space."""
    return words_of(a) == words_of(b)


def same_lines(a: str, b: str) -> bool:
    """Return True if two steps of code are equal except for white space at the ends of lines."""
    return lines_of(a) == lines_of(b)


def lines_of_turn(text: str) -> Sequence[str]:
    """Return the lines of a turn as a critic is shown it: a call's indentation counts, tags do not."""
    return lines_of(untagged(text).strip())


def same_turns(a: str, b: str) -> bool:
    """Return True if two turns are equal except for tags and white space at the ends of lines."""
    return lines_of_turn(a) == lines_of_turn(b)


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
