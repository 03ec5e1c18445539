"""Splits an answer into solution steps, as spans of characters and of tokens."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Sequence

from selfteach.tasks.lab import checker

Span = tuple[int, int]
"""Half-open range of characters or of tokens."""

Splitter = Callable[[str], list[Span]]
"""Maps an answer's text to its steps as spans of characters, in order, the final answer last."""

TAG = re.compile(r"<(step_\d+|answer)>.*?(?:</\1>|(?=<step_\d+>|<answer>)|$)", re.DOTALL)
OUTER_TAGS = re.compile(r"^\s*<(?:step_\d+|answer)>|</(?:step_\d+|answer)>\s*$")

SENTENCE = re.compile(
    r"""
    (?: \d+[.)] [^\S\n]+ )?                     # the number of a list item ends no sentence
    \S (?: [^\n]*? [^\s.!?] [.!?]+ ["')\]*_$]*
           (?= [^\S\n]+ [^\W_a-z] | [^\S\n]+ [$\\(<*"] | \s*(?:\n|\Z) )
         | [^\n]* \S )?
    """,
    re.VERBOSE,
)
"""Matches a line, or a part of it that ends in ``.!?`` before a capital, a number or a formula."""


def lines(text: str) -> list[Span]:
    """Return one step per line that is not blank, and the tag of the final answer."""
    return _with_answer(re.compile(r"[^\n]*\S[^\n]*"), text)


def paragraphs(text: str) -> list[Span]:
    """Return one step per paragraph (lines without a blank one between them), and the answer tag."""
    return _with_answer(re.compile(r"\S(?:(?!\n[^\S\n]*\n).)*", re.DOTALL), text)


def sentences(text: str) -> list[Span]:
    """Return one step per sentence (a line break ends one too), and the tag of the final answer."""
    return _with_answer(SENTENCE, text)


def _with_answer(step: re.Pattern[str], text: str) -> list[Span]:
    """Return the steps before the last ``<answer>``, and the rest of the text as the last span."""
    begin = text.rfind("<answer>")
    if begin < 0:
        return [match.span() for match in step.finditer(text)]
    before = [match.span() for match in step.finditer(text[:begin])]
    return [*before, (begin, len(text.rstrip()))]


def tags(text: str) -> list[Span]:
    """Return the spans of ``<step_1>…</step_1> … <answer>…</answer>``; an open tag ends at the next."""
    return [match.span() for match in TAG.finditer(text)]


def lab(text: str) -> list[Span]:
    """Return the steps of a lab answer: each begins at a node's number, the answer at its mark."""
    starts = [match.start() for match in checker.STEP_START.finditer(text)]
    return list(zip(starts, [*starts[1:], len(text)][: len(starts)], strict=True))


SPLITTERS: dict[str, Splitter] = {
    "tags": tags,
    "lines": lines,
    "paragraphs": paragraphs,
    "sentences": sentences,
}
"""Splitters by their name in a recipe."""


def token_spans(char_spans: Sequence[Span], token_ends: Sequence[int]) -> list[Span]:
    """Convert spans of characters to spans of tokens.

    ``token_ends[i]`` is where token i ends in the text, in characters; a token belongs to the span of
    its last character. Tokens between spans belong to the span before them, so every token from the
    first step on is in a span.
    """
    starts = [bisect_right(token_ends, start) for start, _ in char_spans]
    ends = [*starts[1:], len(token_ends)] if starts else []
    return list(zip(starts, ends, strict=True))


def content(text: str, span: Span) -> str:
    """Return the text of a step, without the tags around it."""
    return OUTER_TAGS.sub("", text[slice(*span)]).strip()
