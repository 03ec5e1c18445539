"""Reads the names of contexts from a command line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from selfteach.config.recipe import CONTEXTS

PAIRS = {"(": ")", "[": "]", "{": "}"}


def context_names(values: Sequence[str]) -> tuple[str, ...]:
    """Return the contexts that options name: each one or several, separated by commas, or ``all``.

    A comma inside brackets or quotes belongs to a name, as in ``parts.py:shown(share=0.5, last=2)``,
    the label of a context with options. ``all`` leaves out ``partly_aligned``, of the lab alone.
    """
    names = [name for value in values for name in _split(value)]
    every = [name for name in CONTEXTS if name not in ("none", "partly_aligned")]
    return tuple(one for name in names for one in (every if name == "all" else [name]))


def _split(value: str) -> Iterator[str]:
    """Yield the names in one option; what opens and does not close takes all that follows."""
    begin, awaited = 0, list[str]()
    for i, character in enumerate(value):
        if awaited and character == awaited[-1]:
            awaited.pop()
        elif awaited and awaited[-1] in "\"'":
            continue
        elif character in PAIRS:
            awaited.append(PAIRS[character])
        elif awaited and character in "\"'":
            awaited.append(character)
        elif character == "," and not awaited:
            yield value[begin:i].strip()
            begin = i + 1
    yield value[begin:].strip()
