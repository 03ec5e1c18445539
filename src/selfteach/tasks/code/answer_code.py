"""Finds the code in an answer: in a fenced block, in ``<answer>`` tags, or the whole text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from selfteach.tasks.final_answers import CLOSE, OPEN, Span, tagged_span

FENCE = re.compile(
    r"^[ \t]{0,3}(?P<fence>`{3,}+|~{3,}+)[ \t]*+(?P<language>[\w+.-]*+)[^\n`]*+\n"
    r"(?P<code>.*?)(?:^[ \t]{0,3}(?P=fence)[`~]*[ \t\r]*$|\Z)",
    re.MULTILINE | re.DOTALL,
)
"""Matches a fenced block; one that is not closed ends with the text. Possessive, so that it takes
time linear in the text."""
MAX_SHOWN = 300
"""Characters of a line that messages show."""
LANGUAGES = frozenset({"", "py", "python", "python3", "py3", "python2"})
STATEMENT = re.compile(
    r"^(?:[ \t]*+(?:async[ \t]+)?def[ \t]+\w+[ \t]*\(|[ \t]*+class[ \t]+\w+[ \t]*[(:]"
    r"|(?:async )?def |class |import |from \w[\w.]* import|for |while |if |try:|with |print\("
    r"|@\w|[A-Za-z_][\w.]*(?:\[[^\]\n]*\])? *(?:[-+*/]?=[^=]|\())",
    re.MULTILINE,
)
"""Matches a line that begins like a statement of Python."""


@dataclass(frozen=True, slots=True)
class AnswerCode:
    """Holds an answer's code, and where it begins in the answer's text."""

    code: str
    begin: int

    def line_span(self, line: int) -> Span | None:
        """Return where a line of the code (from 1) is in the answer's text, without its indentation."""
        lines = self.code.split("\n")
        if not 1 <= line <= len(lines):
            return None
        begin = self.begin + sum(len(one) + 1 for one in lines[: line - 1])
        text = lines[line - 1]
        indent = len(text) - len(text.lstrip())
        return begin + indent, begin + max(indent, len(text.rstrip()))

    def source_line(self, line: int) -> str:
        """Return the text of a line, from 1, shortened; empty if there is none."""
        lines = self.code.split("\n")
        text = lines[line - 1].strip() if 1 <= line <= len(lines) else ""
        return text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "…"


def find_code(text: str, names: Sequence[str] = ()) -> AnswerCode | None:
    """Return an answer's code, or None if it has none.

    It is in the last ``<answer>`` if that is closed and holds any, else before it: the last fenced
    block of Python that defines one of ``names``, else the last one, else the whole of the text if a
    line of it begins like a statement.
    """
    candidates = [AnswerCode(text[a:b], a) for a, b in _searched(text)[1]]
    defining = [code for code in candidates if any(_defines(code.code, name) for name in names)]
    return next(reversed(defining or candidates), None)


def code_regions(text: str) -> list[Span]:
    """Return the spans of all code in an answer: what `find_code` can choose, and other blocks.

    They are in order and do not overlap: a block around the code that is chosen ends where that begins.
    """
    (begin, end), spans = _searched(text)
    for first, last in _blocks(text, 0, len(text)):
        if first < begin:
            spans.append((first, min(last, begin)))
        if last > end and not begin <= first < end:
            spans.append((max(first, end), last))
    return sorted(spans)


def _searched(text: str) -> tuple[Span, list[Span]]:
    """Return the region of an answer that is searched for its code, and what can be the code there."""
    begin, end = 0, len(text)
    if (tags := tagged_span(text)) is not None:
        begin, end = tags[0] + len(OPEN), tags[1] - len(CLOSE)
    blocks = _blocks(text, begin, end)
    if tags is not None and not blocks and not STATEMENT.search(text[begin:end]):
        begin, end = 0, tags[0]  # a tag with words in it; the code is before it
        blocks = _blocks(text, begin, end)
    is_code = not blocks and STATEMENT.search(text[begin:end]) is not None
    return (begin, end), [(begin, end)] if is_code else blocks


def _blocks(text: str, begin: int, end: int) -> list[Span]:
    """Return the spans of the code in fenced blocks of Python, or of no named language."""
    return [
        (begin + match.start("code"), begin + match.end("code"))
        for match in FENCE.finditer(text[begin:end])
        if match["language"].lower() in LANGUAGES
    ]


def _defines(code: str, name: str) -> bool:
    return (
        re.search(
            rf"^[ \t]*+(?:async[ \t]+)?(?:def|class)[ \t]+{re.escape(name)}\b", code, re.MULTILINE
        )
        is not None
    )


def write_code(code: str) -> str:
    """Return the shortest answer that states some code: a fenced block."""
    longest = max((len(run) for run in re.findall("`+", code)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}python\n{code}\n{fence}"
