"""Makes small errors in a line of Python: another number, comparison, operator or name."""

from __future__ import annotations

from collections.abc import Iterator

from selfteach.tasks.code.program_alignment import TOKEN

SWAPS = {
    "<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "==", "+": "-", "-": "+",
    "*": "+", "//": "*", "%": "//", "+=": "-=", "-=": "+=", "*=": "+=", "and": "or", "or": "and",
    "min": "max", "max": "min", "True": "False", "False": "True", "append": "remove", "lower": "upper",
    "upper": "lower", "any": "all", "all": "any", "0": "1", "1": "2", "not": "",
}  # fmt: skip
"""A wrong token for a right one."""


def mutants(step: str) -> list[str]:
    """Return the step with one token changed, for each that can be; no two are the same."""
    pieces = TOKEN.findall(step)
    changed = ("".join([*pieces[:i], other, *pieces[i + 1 :]]) for i, other in _changes(pieces))
    return [mutant for mutant in dict.fromkeys(changed) if mutant != step]


def _changes(pieces: list[str]) -> Iterator[tuple[int, str]]:
    for index, piece in enumerate(pieces):
        if piece in SWAPS:
            yield index, SWAPS[piece]
        elif piece.isdecimal() and piece.isascii() and len(piece) < 20:
            yield index, str(int(piece) + 1)
