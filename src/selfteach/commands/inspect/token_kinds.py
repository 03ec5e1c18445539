"""Which tokens of an answer are style, which are task: by the word that a token belongs to.

The lists are in ``token_kinds.toml``. A token belongs to the word in which its last character that is
no white space lies, so a word that is split over several tokens is one word, and all its tokens are of
one kind. White space, special tokens and a thought before the answer are ``other``.
"""

from __future__ import annotations

import re
import tomllib
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

Kind = Literal["style", "task", "other"]
Language = Literal["english", "lab"]

LISTS: dict[str, dict[str, Any]] = tomllib.loads(
    (Path(__file__).parent / "token_kinds.toml").read_text(encoding="utf-8")
)
STYLE_WORDS = frozenset(
    word for name in ("hesitation", "connective", "manner") for word in LISTS["english"][name]
)
ARTICLES = frozenset({"a", "i"})
"""Words of one letter that are no variables."""

_PIECE = re.compile(
    r"""(?P<tag></?\w+>)                                   # <step_1>, </answer>
      | (?P<command>\\[A-Za-z]+)                           # \\frac
      | (?P<number>\d+(?:[.,]\d+)*)
      | (?P<word>[^\W\d_]+(?:['’-][^\W\d_]+)*)             # let's, double-check
      | (?P<sign>\S)""",
    re.VERBOSE,
)


def kinds(text: str, token_ends: Sequence[int], language: Language = "english") -> list[Kind]:
    """The kind of each token of an answer; ``token_ends[i]`` is where token i ends in the text.

    In the lab a word is what stands between two spaces.
    """
    spans, of_span = _pieces(text, language)
    starts = [start for start, _ in spans]
    told: list[Kind] = []
    begin = 0
    for end in token_ends:
        last = begin + len(text[begin:end].rstrip()) - 1
        at = bisect_right(starts, last) - 1
        inside = last >= begin and at >= 0 and last < spans[at][1]
        told.append(of_span[at] if inside else "other")
        begin = max(begin, end)
    return told


def _pieces(text: str, language: Language) -> tuple[list[tuple[int, int]], list[Kind]]:
    """Words, numbers, signs and tags of a text: where they stand, and of which kind they are."""
    if language == "lab":
        found = list(re.finditer(r"\S+", text))
        return [m.span() for m in found], [_lab_kind(m[0]) for m in found]
    found = list(_PIECE.finditer(text))
    return [m.span() for m in found], [_kind(str(m.lastgroup), m[0].casefold()) for m in found]


def _kind(group: str, said: str) -> Kind:
    said = said.replace("’", "'")
    match group:
        case "command" | "number":
            return "task"
        case "word" if said in STYLE_WORDS:
            return "style"
        case "word":
            return "task" if len(said) == 1 and said not in ARTICLES else "other"
        case "sign":
            return "task" if said in LISTS["english"]["operators"] else "other"
    return "other"


def _lab_kind(said: str) -> Kind:
    if said in LISTS["lab"]["marks"]:
        return "style"
    return "task" if said in LISTS["lab"]["symbols"] else "other"
