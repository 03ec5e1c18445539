"""Finds where a text states its final answer, in time linear in the text."""

from __future__ import annotations

import re

Span = tuple[int, int]
"""Half-open range of characters."""

OPEN, CLOSE = "<answer>", "</answer>"
BRACES = re.compile(r"\\\\?(?:fbox|framebox|f?boxed)\s*\{|\\.|[{}]", re.DOTALL)
"""Matches the beginning of a box (also with a doubled backslash), an escaped character, or a brace."""
BOX = re.compile(r"\\(?:framebox|f?boxed|fbox)(?![A-Za-z])")
WHOLE_BOX = re.compile(r"\s*\\(?:framebox|f?boxed|fbox)\s*\{(.*)\}\s*", re.DOTALL)
BARE_BOX = re.compile(r"\\f?boxed\s*(-?\d+(?:\.\d+)?|[A-Za-z])(?![A-Za-z\d])")
"""Matches a box without braces: TeX boxes what follows, models write ``\\boxed 73``."""
WRAPPERS = (
    ("**", "**"),
    ("*", "*"),
    ("__", "__"),
    ("_", "_"),
    ("$$", "$$"),
    ("$", "$"),
    ("\\(", "\\)"),
    ("\\[", "\\]"),
    ("```", "```"),
    ("`", "`"),
    ('"', '"'),
    ("'", "'"),
    ("“", "”"),
)
"""What Markdown and LaTeX put around an answer."""


def tagged_span(text: str) -> Span | None:
    """Return the span of the last ``<answer>…</answer>``, tags included; None if none is closed.

    A tag that is never closed states no answer: what follows it may be anything.
    """
    last = text.rfind(CLOSE)
    begin = text.rfind(OPEN, 0, last) if last >= 0 else -1
    return (begin, text.index(CLOSE, begin) + len(CLOSE)) if begin >= 0 else None


def final_answer(text: str) -> str | None:
    """Return the content of the last closed ``<answer>`` tag, or None."""
    span = tagged_span(text)
    if span is None:
        return None
    return text[span[0] + len(OPEN) : span[1] - len(CLOSE)].strip() or None


def last_boxed(text: str) -> str | None:
    """Return the content of the last ``\\boxed{}`` or ``\\fbox{}`` whose braces close, or None."""
    return _last_box(text)[1] or None


def last_box_begin(text: str) -> int | None:
    """Return where the last box begins that is not empty, or None."""
    begin, content = _last_box(text)
    return begin if content else None


def _last_box(text: str) -> tuple[int, str | None]:
    begin, content = -1, None
    opened: list[tuple[int, int] | None] = []
    for match in BRACES.finditer(text):
        if match[0] == "}":
            box = opened.pop() if opened else None
            if box is not None and box[0] > begin:
                begin, content = box[0], text[box[1] : match.start()].strip()
        elif match[0].endswith("{") and match[0] != "\\{":
            opened.append(None if match[0] == "{" else match.span())
    for match in BARE_BOX.finditer(text):
        if match.start() > begin:
            begin, content = match.start(), match[1]
    return begin, content


def tag_or_boxed(text: str) -> str | None:
    """Return the tagged answer, or the box in it; without a tag, the content of the last box.

    A tag with several boxes states all that it holds.
    """
    tagged = final_answer(text)
    if tagged is None:
        return last_boxed(text)
    several = len(BOX.findall(tagged)) > 1
    return tagged if several else last_boxed(tagged) or tagged


def unboxed(answer: str) -> str:
    """Return the content of a box around a whole answer, or the answer."""
    box = WHOLE_BOX.fullmatch(answer)
    return answer if box is None or box[1].strip() != last_boxed(answer) else box[1].strip()


def unwrapped(answer: str) -> str:
    """Remove what Markdown and LaTeX put around a whole answer: ``**$5$**`` becomes ``5``."""
    for _ in range(len(WRAPPERS)):
        before, answer = answer, answer.strip()
        for left, right in WRAPPERS:
            inner = answer[len(left) : -len(right)]
            if answer.startswith(left) and answer.endswith(right) and inner.strip():
                answer = inner if left not in inner and right not in inner else answer
        if answer == before:
            break
    return answer.strip()
