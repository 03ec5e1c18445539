"""Classify tokens as style, task or other by the word that a token belongs to.

The word lists are in ``token_kinds.toml``. A token belongs to the word that contains its last
non-whitespace character, so all tokens of a word have the same kind. Whitespace, special tokens and
the thinking before the answer are ``other``.
"""

from __future__ import annotations

import re
import tomllib
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

TokenKind = Literal["style", "task", "other"]
Language = Literal["english", "lab"]

LISTS: dict[str, dict[str, Any]] = tomllib.loads(
    (Path(__file__).parent / "token_kinds.toml").read_text(encoding="utf-8")
)
STYLE_WORDS = frozenset(
    word for name in ("hesitation", "connective", "manner") for word in LISTS["english"][name]
)
ARTICLES = frozenset({"a", "i"})
"""One-letter words that are not variables."""

_WORD = re.compile(
    r"""(?P<tag></?\w+>)                                   # <step_1>, </answer>
      | (?P<command>\\[A-Za-z]+)                           # \\frac
      | (?P<number>\d+(?:[.,]\d+)*)
      | (?P<word>[^\W\d_]+(?:['’-][^\W\d_]+)*)             # let's, double-check
      | (?P<sign>\S)""",
    re.VERBOSE,
)


def token_kinds(
    text: str, token_ends: Sequence[int], language: Language = "english"
) -> list[TokenKind]:
    """Return the kind of each token of a rollout; ``token_ends[i]`` is where token i ends in ``text``.

    Words of the lab's language are separated by spaces.
    """
    spans, span_kinds = _words(text, language)
    starts = [start for start, _ in spans]
    kinds: list[TokenKind] = []
    begin = 0
    for end in token_ends:
        last = begin + len(text[begin:end].rstrip()) - 1
        at = bisect_right(starts, last) - 1
        in_span = last >= begin and at >= 0 and last < spans[at][1]
        kinds.append(span_kinds[at] if in_span else "other")
        begin = max(begin, end)
    return kinds


def _words(text: str, language: Language) -> tuple[list[tuple[int, int]], list[TokenKind]]:
    """Find the words, numbers, signs and tags of a text; return their spans and kinds."""
    if language == "lab":
        words = list(re.finditer(r"\S+", text))
        return [m.span() for m in words], [_lab_kind(m[0]) for m in words]
    words = list(_WORD.finditer(text))
    return [m.span() for m in words], [_kind(str(m.lastgroup), m[0].casefold()) for m in words]


def _kind(group: str, word: str) -> TokenKind:
    word = word.replace("’", "'")
    match group:
        case "command" | "number":
            return "task"
        case "word" if word in STYLE_WORDS:
            return "style"
        case "word":
            return "task" if len(word) == 1 and word not in ARTICLES else "other"
        case "sign":
            return "task" if word in LISTS["english"]["operators"] else "other"
    return "other"


def _lab_kind(word: str) -> TokenKind:
    if word in LISTS["lab"]["marks"]:
        return "style"
    return "task" if word in LISTS["lab"]["symbols"] else "other"
