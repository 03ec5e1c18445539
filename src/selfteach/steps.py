"""Where an answer's steps begin and end, in its text and in its tokens."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Sequence

from selfteach.lab import checker

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
    """One step per line that is not blank."""
    return [match.span() for match in re.finditer(r"[^\n]*\S[^\n]*", text)]


def paragraphs(text: str) -> list[Span]:
    """One step per run of lines without a blank one between them."""
    return [match.span() for match in re.finditer(r"\S(?:(?!\n[^\S\n]*\n).)*", text, re.DOTALL)]


def sentences(text: str) -> list[Span]:
    """One step per sentence; a line break ends one too."""
    return [match.span() for match in SENTENCE.finditer(text)]


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
