"""Splits an answer that is code into steps: its statements, line by line, and the text around them."""

from __future__ import annotations

import ast
import contextlib
import io
import tokenize
from collections.abc import Iterator
from typing import NamedTuple

from selfteach.tasks.code.answer_code import code_regions
from selfteach.tasks.final_answers import Span

SILENT = {tokenize.NL, tokenize.COMMENT, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING}
"""Kinds of tokens that begin no statement."""


class IndentedSpan(NamedTuple):
    """Is the span of a step whose white space counts, as a line of Python: a range of characters."""

    begin: int
    end: int


def code_steps(text: str) -> list[Span]:
    """Return the steps of an answer that is code, and an empty span at its end.

    In the answer's code and in other fenced blocks of Python a step is what Python calls a
    logical line: a simple statement, however many lines it has, or the header of a compound one
    (``for …:``, ``else:``, a decorator); lines of the body are steps of their own, and so are comments.
    Around the code every line that is not blank is a step, those of the fence too. Spans begin at
    their line's first character, indentation included.

    The last span is empty: a program is its own final answer, which has no text besides the steps.
    """
    spans: list[Span] = []
    at = 0
    for begin, end in (*code_regions(text), (len(text), len(text))):
        spans += [IndentedSpan(at + a, at + b) for a, b in _nonblank(text[at:begin])]
        spans += [IndentedSpan(begin + a, begin + b) for a, b in statement_lines(text[begin:end])]
        at = end
    return [*spans, IndentedSpan(spans[-1][1], spans[-1][1])] if spans else []


def _nonblank(text: str) -> list[Span]:
    return [span for span in _lines(text) if text[slice(*span)].strip()]


def _lines(text: str) -> list[Span]:
    """Return the spans of all lines, without their line breaks."""
    spans, begin = [], 0
    for line in text.split("\n"):
        spans.append((begin, begin + len(line.rstrip("\r"))))
        begin += len(line) + 1
    return spans


def statement_lines(code: str) -> list[Span]:
    """Return the spans of a code's logical lines and comments; of what has no tokens, of its lines.

    They are in order, do not overlap, and leave out nothing but blank lines. A statement that is never
    closed (a bracket, a text) and what follows it are split into lines.
    """
    lines, spans, at = _lines(code), [], 0
    for first, last in _joined_lines(code):
        if at <= first < last < len(lines):
            spans += lines[at:first]
            spans.append((lines[first][0], lines[last][1]))
            at = last + 1
    spans += lines[at:]
    return [span for span in spans if code[slice(*span)].strip()]


def _joined_lines(code: str) -> Iterator[tuple[int, int]]:
    """Yield the first and last line, from 0, of each statement that has several, up to an error."""
    first: int | None = None
    # What the tokenizer refuses ends here: brackets, texts, indentation, null bytes.
    with contextlib.suppress(tokenize.TokenError, SyntaxError, ValueError):
        for token in tokenize.generate_tokens(io.StringIO(code).readline):
            if token.type == tokenize.NEWLINE and first is not None:
                if token.start[0] > first:
                    yield first - 1, token.start[0] - 1
                first = None
            elif token.type not in SILENT and first is None:
                first = token.start[0]


def is_remark(step: str) -> bool:
    """Return True for a step that does nothing: comments alone, or a text as a docstring is."""
    lines = [line.strip() for line in step.strip().split("\n")]
    if all(not line or line.startswith("#") for line in lines):
        return True
    if lines[0][0] not in "'\"rRuU":
        return False
    try:
        return isinstance(ast.literal_eval(step.strip()), str)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return False
