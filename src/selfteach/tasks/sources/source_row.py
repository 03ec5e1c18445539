"""Defines a row of a source of problems, and what is wrong with a row that gives no problem."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Row:
    """Holds one row of a source."""

    values: dict[str, Any]
    where: str
    """Location of the row for error messages: ``problems.jsonl:17``."""
    name: str
    """Place of the row: ``problems-17``."""
    untyped: bool = False
    """True if the source knows no numbers, as CSV: every value is a text."""


class MissingValue(Exception):
    """Signals that a row lacks what a column names; the message says what."""


class UnreadableValue(MissingValue):
    """Signals that a row's value is no text or number, or not a known one."""


def shortest(value: Any, kind: Any) -> Any:
    """Return a value of a column of narrow floats as the shortest number: 0.1, not 0.10000000149011612.

    ``kind`` is the column's Arrow type, or a type's name; lists and tables are changed within. Other
    types change nothing.
    """
    import numpy as np

    if isinstance(value, list) and hasattr(kind, "value_type"):
        return [shortest(element, kind.value_type) for element in value]
    if isinstance(value, dict) and hasattr(kind, "field"):
        return {name: shortest(element, kind.field(name).type) for name, element in value.items()}
    narrow = {
        "halffloat": np.float16,
        "float16": np.float16,
        "float": np.float32,
        "float32": np.float32,
    }
    if not isinstance(value, float) or str(kind) not in narrow:
        return value
    return float(str(narrow[str(kind)](value)))
