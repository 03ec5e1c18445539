"""Recognises columns by the usual names for what they hold, TRL's and verl's among them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from selfteach.config.data_section import Columns
from selfteach.tasks.final_answers import last_boxed
from selfteach.tasks.sources.source_row import MissingValue, Row

QUESTIONS = ("question", "prompt", "problem", "messages")
"""Names of a column of questions, the first that a row has."""
ANSWERS = (
    "answer", "final_answer", "expected_answer", "ground_truth", "reward_model.ground_truth",
    "solution",
)  # fmt: skip
"""Names of a column of final answers, the first that a row has."""

ColumnsRead = dict[str, dict[str, None]]
"""The columns that were read, by what they were read for, in the order of the rows."""


def recognised(
    row: Row, columns: Columns, read: ColumnsRead | None = None, *, need_answer: bool = True
) -> Columns:
    """Return the columns with names that this row has, for those that the recipe leaves at defaults.

    Raises `MissingValue`, naming the columns of the row, if none is recognised; without ``need_answer``
    the column of the answer is then empty.
    """
    changed: dict[str, str] = {}
    for name, usual in (("question", QUESTIONS), ("answer", ANSWERS)):
        if getattr(columns, name) == usual[0] and usual[0] not in row.values:
            is_needed = need_answer or name != "answer" or any(_has(row.values, c) for c in usual)
            changed[name] = _first(row.values, usual, name) if is_needed else ""
    if changed.get("answer") == "solution" and _boxed(row) is not None:
        changed["answer"] = "solution | boxed"
    if (
        columns.reference is None
        and "reference" not in row.values
        and _is_worked(row, changed.get("answer", columns.answer))
    ):
        changed["reference"] = "solution"
    if read is not None:
        for name in ("question", "answer", "reference"):
            column = changed.get(name, getattr(columns, name))
            if column:
                read.setdefault(name, {})[column] = None
        _record_other_prompts(row, columns, changed, read)
    return columns.model_copy(update=changed)


def described(read: ColumnsRead) -> str:
    """Return in one line which columns were read for what."""
    named = {name: " or ".join(columns) for name, columns in read.items() if name != "not read"}
    line = ", ".join(f"{name} from {columns}" for name, columns in named.items())
    others = read.get("not read")
    return f"{line}; not read: {', '.join(others)}" if others else line


def _boxed(row: Row) -> str | None:
    """Return the content of the last box of a row's solution."""
    text = row.values.get("solution")
    return last_boxed(text) if isinstance(text, str) else None


def _is_worked(row: Row, answer: str) -> bool:
    """Return True if a row's solution says more than its answer, of column ``answer``."""
    text = row.values.get("solution")
    if not isinstance(text, str) or not text.strip():
        return False
    if answer == "solution | boxed":
        return len(text.strip()) > len(_boxed(row) or text) + len(r"$$\boxed{}$$.")
    return "solution" not in answer and text.strip() != str(row.values.get(answer)).strip()


def _record_other_prompts(
    row: Row, columns: Columns, changed: Mapping[str, str], read: ColumnsRead
) -> None:
    """Record columns beside the question's that look like prompts too."""
    if columns.question == QUESTIONS[0]:
        source = changed.get("question", QUESTIONS[0])
        for name in QUESTIONS:
            if name != source and name in row.values:
                read.setdefault("not read", {})[name] = None


def _first(values: Mapping[str, Any], usual: tuple[str, ...], name: str) -> str:
    for column in usual:
        if _has(values, column):
            return column
    others = ", ".join(usual[1:-1]) + f" or {usual[-1]}"
    present = ", ".join(map(repr, values)) or "none"
    raise MissingValue(
        f"no column {usual[0]!r} (nor {others}); the columns are {present}: name the one of the "
        f'{name}, data.columns.{name} = "…"'
    )


def _has(values: Mapping[str, Any], column: str) -> bool:
    first, _, rest = column.partition(".")
    inner = values.get(first)
    return first in values if not rest else isinstance(inner, Mapping) and _has(inner, rest)
