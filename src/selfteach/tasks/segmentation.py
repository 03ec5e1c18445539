"""Splits an answer into solution steps, as spans of characters and of tokens."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Sequence

from selfteach.tasks.code.code_steps import IndentedSpan, code_steps
from selfteach.tasks.final_answers import OPEN, Span, last_box_begin, tagged_span
from selfteach.tasks.lab import checker
from selfteach.types import Rollout, Verdict

Splitter = Callable[[str], list[Span]]
"""Maps an answer's text to its steps as spans of characters, in order, the final answer last."""

STEP = r"step_\d{1,9}"
"""Matches a step's name; more digits are no number that a solver writes."""
TAG = re.compile(rf"<({STEP}|answer)>.*?(?:</\1>|(?=<{STEP}>|<answer>)|$)", re.DOTALL)
OUTER_TAGS = re.compile(rf"^\s*<(?:{STEP}|answer)>|</(?:{STEP}|answer)>\s*$")

PARAGRAPH = re.compile(r"\S(?:(?!\n[^\S\n]*\n).)*", re.DOTALL)

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
    return _with_answer(nonblank_lines, text)


def paragraphs(text: str) -> list[Span]:
    """Return one step per paragraph (lines without a blank one between them), and the answer tag."""
    return _with_answer(lambda before: [m.span() for m in PARAGRAPH.finditer(before)], text)


def sentences(text: str) -> list[Span]:
    """Return one step per sentence (a line break ends one too), and the tag of the final answer."""
    return _with_answer(lambda before: [m.span() for m in SENTENCE.finditer(before)], text)


def _with_answer(steps: Splitter, text: str) -> list[Span]:
    """Return the steps before the last ``<answer>``, and the rest of the text as the last span.

    Without a tag, the step that holds the last box is the last span, with what follows it.
    """
    closed = tagged_span(text)
    begin = text.rfind(OPEN) if closed is None else closed[0]
    if begin >= 0:
        return [*steps(text[:begin]), (begin, len(text.rstrip()))]
    spans = steps(text)
    box = last_box_begin(text)
    if box is None or not spans:
        return spans
    last = max(0, bisect_right([start for start, _ in spans], box) - 1)
    return [*spans[:last], (spans[last][0], spans[-1][1])]


def nonblank_lines(text: str) -> list[Span]:
    """Return the spans of the lines that are not blank, without their line breaks."""
    spans, begin = [], 0
    for line in text.split("\n"):
        if line.strip():
            spans.append((begin, begin + len(line)))
        begin += len(line) + 1
    return spans


def tags(text: str) -> list[Span]:
    """Return the spans of ``<step_1>…</step_1> … <answer>…</answer>``; an open tag ends at the next.

    A box behind the last step is the answer, and the last span.
    """
    spans = [match.span() for match in TAG.finditer(text)]
    if spans and not text.startswith(OPEN, spans[-1][0]):
        rest = text[spans[-1][1] :]
        if last_box_begin(rest) is not None:
            spans.append((len(text) - len(rest.lstrip()), len(text.rstrip())))
    return spans


def lab(text: str) -> list[Span]:
    """Return the steps of a lab answer: each begins at a node's number, the answer at its mark."""
    starts = [match.start() for match in checker.STEP_START.finditer(text)]
    return list(zip(starts, [*starts[1:], len(text)][: len(starts)], strict=True))


SPLITTERS: dict[str, Splitter] = {
    "tags": tags,
    "lines": lines,
    "paragraphs": paragraphs,
    "sentences": sentences,
    "code": code_steps,
}
"""Splitters by their name in a recipe."""


def step_spans(rollout: Rollout, split_steps: Splitter) -> list[Span]:
    """Return a rollout's steps as spans of characters: of an episode its turns, the last one last."""
    return rollout.turn_spans if rollout.is_episode else list(split_steps(rollout.text))


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
    """Return the text of a step, without the tags around it; a line of code with its indentation."""
    if isinstance(span, IndentedSpan):
        return text[slice(*span)].rstrip()
    return OUTER_TAGS.sub("", text[slice(*span)]).strip()


def before_answer(rollout: Rollout, verdict: Verdict, spans: Sequence[Span]) -> Sequence[Span]:
    """Return the spans of a rollout's steps before its final answer, if it has one."""
    return spans if judged_by_environment(rollout) else without_final(spans, verdict.parsed)


def judged_by_environment(rollout: Rollout) -> bool:
    """Return True if an environment has judged the episode: then no turn of it is a final answer.

    No verifier can read such an answer, and all turns are steps, the last one too.
    """
    return rollout.verdict is not None and not rollout.is_broken


def without_final(spans: Sequence[Span], parsed: str | None) -> Sequence[Span]:
    """Return the spans of the steps before the final answer, which is the last span.

    There is one if a verifier has ``parsed`` one, or if the last span is empty: a program is its own
    final answer.
    """
    is_final = bool(spans) and (parsed is not None or spans[-1][0] == spans[-1][1])
    return spans[:-1] if is_final else spans
