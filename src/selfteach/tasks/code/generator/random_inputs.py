"""Draws arguments for generated functions, by their kind: numbers, words, tables, commands."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

WORDS = (
    "apple", "bean", "cab", "dote", "ebb", "fade", "add", "bade", "code", "dab", "ace", "bob", "a",
    "be", "cod", "dada", "abode", "bead", "decade", "oboe", "od", "cede",
)  # fmt: skip
NAMES = ("ann", "bo", "cy", "dee")
MAX_LENGTH = 9


def arguments_of(kinds: tuple[str, ...], rng: np.random.Generator, *, empty: bool) -> list[Any]:
    """Draw an argument of each kind; with ``empty`` the smallest one there is."""
    return [KINDS[kind](rng, 0 if empty else int(rng.integers(1, MAX_LENGTH))) for kind in kinds]


def _between(rng: np.random.Generator, low: int, high: int) -> int:
    return int(rng.integers(low, high + 1))


def _integers(rng: np.random.Generator, length: int) -> list[int]:
    return [_between(rng, -12, 24) for _ in range(length)]


def _of(rng: np.random.Generator, choices: tuple[Any, ...]) -> Any:
    return choices[_between(rng, 0, len(choices) - 1)]


def _letters(rng: np.random.Generator, alphabet: str, length: int) -> str:
    return "".join(_of(rng, tuple(alphabet)) for _ in range(length))


def _items(rng: np.random.Generator, length: int) -> list[int | str]:
    symbols = ("+", "-", "dup", "+", *range(6))
    return [_of(rng, symbols) for _ in range(length)]


def _ranges(rng: np.random.Generator, length: int) -> list[list[int]]:
    starts = [_between(rng, 0, 30) for _ in range(length)]
    return [[first, first + _between(rng, 0, 5)] for first in starts]


KINDS: dict[str, Callable[[np.random.Generator, int], Any]] = {
    "integer": lambda rng, length: _between(rng, -9, 30) if length else 0,
    "natural": lambda rng, length: _between(rng, 1, 10 ** min(length, 3)) if length else 0,
    "small": lambda rng, length: _between(rng, 1, 14) if length else 0,
    "integers": _integers,
    "naturals": lambda rng, length: [_between(rng, 0, 20) for _ in range(length)],
    "amounts": lambda rng, length: [_between(rng, -20, 20) for _ in range(length)],
    "bits": lambda rng, length: [_between(rng, 0, 1) for _ in range(length)],
    "word": lambda rng, length: _letters(rng, "abcdeo", length),
    "repetitive": lambda rng, length: "".join(
        c * _between(rng, 1, 5) for c in _letters(rng, "abc", min(length, 5))
    ),
    "words": lambda rng, length: [_of(rng, WORDS) for _ in range(length)],
    "sentence": lambda rng, length: " ".join(
        _of(rng, (*WORDS, "xyz", "A1!")) for _ in range(length)
    ),
    "commands": lambda rng, length: _letters(rng, "FFFLR", 2 * length),
    "pairs": lambda rng, length: [[_of(rng, NAMES), _between(rng, -5, 15)] for _ in range(length)],
    "table": lambda rng, length: {_of(rng, WORDS): _between(rng, -9, 24) for _ in range(length)},
    "items": _items,
    "ranges": _ranges,
}
"""Functions that draw a value of about a length; 0 is the smallest value of the kind."""
