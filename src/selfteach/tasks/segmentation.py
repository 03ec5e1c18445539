"""Where an answer's steps begin and end, in its text and in its tokens."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Sequence

from selfteach.tasks.lab import checker

Span = tuple[int, int]
"""Half-open range of characters or of tokens."""

Splitter = Callable[[str], list[Span]]
"""From an answer's text to its steps as spans of characters, in order, the final answer last."""

TAG = re.compile(r"<(step_\d+|answer)>.*?(?:</\1>|(?=<step_\d+>|<answer>)|$)", re.DOTALL)
OUTER_TAGS = re.compile(r"^\s*<(?:step_\d+|answer)>|</(?:step_\d+|answer)>\s*$")

SENTENCE = re.compile(
    r"""
    (?: \d+[.)] [^\S\n]+ )?                     # the number of an item ends no sentence
    \S (?: [^\n]*? [^\s.!?] [.!?]+ ["')\]*_$]*
           (?= [^\S\n]+ [^\W_a-z] | [^\S\n]+ [$\\(<*"] | \s*(?:\n|\Z) )
         | [^\n]* \S )?
    """,
    re.VERBOSE,
)
"""A line, or what of it ends in a full stop before a word with a capital, a number or a formula."""


def lines(text: str) -> list[Span]:
    """One step per line that is not blank, and the tag of the final answer."""
    return _with_answer(re.compile(r"[^\n]*\S[^\n]*"), text)


def paragraphs(text: str) -> list[Span]:
    """One step per run of lines without a blank one between them, and the tag of the final answer."""
    return _with_answer(re.compile(r"\S(?:(?!\n[^\S\n]*\n).)*", re.DOTALL), text)


def sentences(text: str) -> list[Span]:
    """One step per sentence; a line break ends one too; and the tag of the final answer."""
    return _with_answer(SENTENCE, text)


def _with_answer(step: re.Pattern[str], text: str) -> list[Span]:
    """Steps up to the last ``<answer>``, which is a span by itself wherever it stands."""
    begin = text.rfind("<answer>")
    if begin < 0:
        return [match.span() for match in step.finditer(text)]
    before = [match.span() for match in step.finditer(text[:begin])]
    return [*before, (begin, len(text.rstrip()))]


def tags(text: str) -> list[Span]:
    """Steps ``<step_1>…</step_1> … <answer>…</answer>``; a tag that is not closed ends at the next."""
    return [match.span() for match in TAG.finditer(text)]


def lab(text: str) -> list[Span]:
    """Steps of the lab: each begins at a node's name, the answer at its mark."""
    starts = [match.start() for match in checker.STEP_START.finditer(text)]
    return list(zip(starts, [*starts[1:], len(text)][: len(starts)], strict=True))


SPLITTERS: dict[str, Splitter] = {
    "tags": tags,
    "lines": lines,
    "paragraphs": paragraphs,
    "sentences": sentences,
}
"""Splitters by the name a recipe gives them."""


def token_spans(char_spans: Sequence[Span], token_ends: Sequence[int]) -> list[Span]:
    """Spans of characters as spans of tokens.

    ``token_ends[i]`` is where token i ends in the text; a token belongs to the span in which its
    last character lies. Tokens between spans belong to the span before them, so the spans of a
    text's steps leave no token out from the first step on.
    """
    starts = [bisect_right(token_ends, start) for start, _ in char_spans]
    ends = [*starts[1:], len(token_ends)] if starts else []
    return list(zip(starts, ends, strict=True))


def content(text: str, span: Span) -> str:
    """What a step says, without the tags around it."""
    return OUTER_TAGS.sub("", text[slice(*span)]).strip()
