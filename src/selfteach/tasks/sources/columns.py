"""Converts a row to a `Problem`: maps columns to fields, with the few rules that real data need."""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from datetime import date, datetime, time
from decimal import Context, Decimal
from functools import cache
from importlib import resources
from typing import Any, TypeVar

from selfteach.config.data_section import Columns, HubData, RowsData
from selfteach.config.schema import merge, nearest, validate
from selfteach.errors import DataError, RecipeError
from selfteach.tasks.final_answers import last_boxed
from selfteach.tasks.sources.conversations import (
    Messages,
    is_conversation,
    read_messages,
    read_prompt,
)
from selfteach.tasks.sources.recognised import ColumnsRead, recognised
from selfteach.tasks.sources.source_row import MissingValue, Row, UnreadableValue
from selfteach.types import Problem

FIELD = re.compile(r"\{([\w.]+)\}")
RULES = ("after:X", "before:X", "boxed", "first", "last", "join:X")
SOURCES = ("train", "validation", "test", "pool")
REFERENCES = ("reference", "aligned_reference")


NOT_A_NUMBER = frozenset({"nan", "-nan", "<na>", "#n/a", "nat"})
"""What tables write for a missing value, without case."""

MAX_DIGITS_OF_A_DECIMAL = 12
"""Of a number that 15 digits make this short, further digits are rounding errors."""
SURROGATE = re.compile("[\ud800-\udfff]")
NO_WIDTH = "\u200b\u2060\ufeff"

R = TypeVar("R", bound=RowsData)


@cache
def ready_mappings() -> Mapping[str, Mapping[str, Any]]:
    """Return the mappings that ship with the package, by name: see ``mappings.toml``."""
    text = resources.files("selfteach.tasks.sources").joinpath("mappings.toml").read_text("utf-8")
    return tomllib.loads(text)


def with_mapping(config: R) -> R:
    """Return the section with its ready-made mapping filled in; the recipe's keys take precedence.

    Raises `RecipeError` for an unknown mapping.
    """
    if config.mapping is None:
        return config
    mappings = ready_mappings()
    if config.mapping not in mappings:
        raise RecipeError(f"data.mapping = {config.mapping!r}; {nearest(config.mapping, mappings)}")
    overrides = config.model_dump(exclude_unset=True)
    ready = {k: v for k, v in mappings[config.mapping].items() if k in type(config).model_fields}
    if "path" in overrides:
        ready.pop(
            "name", None
        )  # it names a configuration of the mapping's dataset, not of this one
    if not isinstance(config, HubData) or overrides.keys() & set(SOURCES):
        # The mapping's sources are splits on the hub; a recipe that names a source replaces them all.
        replaced = SOURCES if "pool" in overrides else (*SOURCES, "split")
        ready = {k: v for k, v in ready.items() if k not in replaced}
    return validate(type(config), merge(ready, overrides), where="data")


def problem_from(row: Row, columns: Columns, read: ColumnsRead | None = None) -> Problem:
    """Convert a row to a problem. Raises `MissingValue` if it has no question or answer.

    Columns that the recipe leaves at their default names are recognised by other usual names too; what
    was read for what is recorded in ``read``.
    """
    columns = recognised(row, columns, read)
    history, question = _question(row, columns)
    answer = _required(row, columns.answer, "answer") if columns.answer else ""
    named = {name: getattr(columns, name) for name in REFERENCES}
    references = {
        name: text
        for name, column in named.items()
        if (text := _optional(row, column or name, required=column is not None))
    }
    id_ = _optional(row, columns.id or "id", required=columns.id is not None)
    place = "" if id_ else row.name
    meta = _meta(row, columns.meta)
    id_ = id_ or content_id(question, answer, history)
    return Problem(id_, question, answer, references, meta, place, history)


def content_id(question: str, answer: str, history: Messages = ()) -> str:
    """Return the id of a problem whose row has none: a hash, the same wherever the row stands."""
    content = json.dumps([question, answer, *history]).encode()
    return "q_" + hashlib.blake2b(content, digest_size=8).hexdigest()


def column_value(values: Mapping[str, Any], column: str) -> Any:
    """Evaluate a column spec on a row: a path with rules, or a template.

    Raises `MissingValue`, or `RecipeError` for a rule that does not exist.
    """
    if FIELD.search(column):
        return FIELD.sub(lambda match: _text(_at(values, match[1])), column)
    path, *rules = re.split(r" *\| *", column)
    value = _at(values, path)
    for rule in rules:
        value = _apply(rule, value)
    return value


def matches(row: Row, column: str, allowed: Sequence[Any]) -> bool:
    """Return True if a row's column has one of the values; as texts, where the row knows no numbers.

    Raises `MissingValue`.
    """
    value = column_value(row.values, column)
    return value in allowed or (row.untyped and value in map(_text, allowed))


def _question(row: Row, columns: Columns) -> tuple[Messages, str]:
    """Return the messages before the question, and the question: a text, or the last message."""
    history = _history(row, columns.history)
    value = column_value(row.values, columns.question)
    if not is_conversation(value):
        return history, _required(row, columns.question, "question")
    try:
        earlier, question = read_prompt(value)
    except UnreadableValue as unreadable:
        raise UnreadableValue(f"the prompt {unreadable}") from None
    if history and earlier and earlier[0][0] == "system":
        raise UnreadableValue("the prompt has a system message after the messages of the history")
    return (*history, *earlier), _filled(_stripped(question), "question")


def _history(row: Row, column: str | None) -> Messages:
    """Return the messages of a column; none if no recipe names it and it holds something else."""
    if column is None and not is_conversation(row.values.get("history")):
        return ()
    value = column_value(row.values, column or "history")
    if not value:
        return ()
    try:
        if not is_conversation(value):
            raise UnreadableValue("is no list of messages")
        return read_messages(value)
    except UnreadableValue as unreadable:
        raise UnreadableValue(f"the history {unreadable}") from None


def _required(row: Row, column: str, name: str) -> str:
    try:
        return _filled(_stripped(_text(column_value(row.values, column))), name)
    except UnreadableValue as unreadable:
        raise UnreadableValue(f"the {name} {unreadable}") from None


def _filled(text: str, name: str) -> str:
    """Return a text. Raises `MissingValue` if it is empty, or what tables write for nothing."""
    if not text:
        raise MissingValue(f"the {name} is empty")
    if text.casefold() in NOT_A_NUMBER:
        raise UnreadableValue(f"is {text!r}, what a table writes where nothing is known")
    return text


def _stripped(text: str) -> str:
    """Return a text without white space and characters of no width around it."""
    return text.strip().strip(NO_WIDTH).strip()


def _optional(row: Row, column: str, *, required: bool) -> str | None:
    """Return a text or None; a column that the recipe names (``required``) must exist in every row."""
    try:
        return _stripped(_text(column_value(row.values, column))) or None
    except UnreadableValue as unreadable:
        if required:
            raise UnreadableValue(f"column {column!r} {unreadable}") from None
        return None
    except MissingValue:
        top = re.split(r"[.| {}]", column.lstrip("{"))[0]
        if required and top not in row.values:
            raise
        return None


def _meta(row: Row, meta: str | tuple[str, ...] | None) -> dict[str, Any]:
    if isinstance(meta, tuple):
        return {name: _plain(column_value(row.values, name)) for name in meta}
    table = row.values.get(meta or "meta")
    if meta is not None and not isinstance(table, Mapping):
        raise MissingValue(f"no table in column {meta!r}")
    return _plain(table) if isinstance(table, Mapping) else {}


def _plain(value: Any) -> Any:
    """Round-trip a value through JSON, so that a problem is the same in memory and read from a file."""
    return json.loads(json.dumps(value, default=str))


def _at(values: Mapping[str, Any], path: str) -> Any:
    """Follow a dotted path through tables and lists; a column of that very name takes precedence."""
    if path in values:
        return values[path]
    value: Any = values
    for key in path.split("."):
        if isinstance(value, Mapping) and key in value:
            value = value[key]
        elif isinstance(value, Sequence) and not isinstance(value, str) and _is_index(key, value):
            value = value[int(key)]
        else:
            columns = list(value) if isinstance(value, Mapping) else []
            hint = f"; {nearest(key, columns)}" if columns else ""
            raise MissingValue(f"no column {path!r}{hint}")
    return value


def _is_index(key: str, values: Sequence[Any]) -> bool:
    return key.lstrip("-").isdigit() and -len(values) <= int(key) < len(values)


def _apply(rule: str, value: Any) -> Any:
    name, _, argument = rule.partition(":")
    match name:
        case "after" | "before" if argument:
            before, separator, after = _text(value).rpartition(argument)
            if not separator:
                raise MissingValue(f"no {argument!r} in it")
            return after if name == "after" else before
        case "boxed":
            boxed = last_boxed(_text(value))
            if boxed is None:
                raise MissingValue("no \\boxed{} in it")
            return boxed
        case "first" | "last":
            if not isinstance(value, Sequence) or isinstance(value, str) or not value:
                raise MissingValue(f"no list to take the {name} of")
            return value[0 if name == "first" else -1]
        case "join":
            if isinstance(value, str) or not isinstance(value, Sequence):
                raise MissingValue("no list to join")
            return argument.join(map(_text, value))
        case _:
            raise RecipeError(f"data.columns: no rule {rule!r}; rules: {', '.join(RULES)}")


def _text(value: Any) -> str:
    """Format a value as a person would write it: 3.0 as 3, 1e-05 as 0.00001, None as nothing.

    Raises `UnreadableValue` for what no person writes as one text: NaN, a list, a table, bytes.
    """
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float | Decimal):
        number = Decimal(repr(value)) if isinstance(value, float) else value
        if not number.is_finite():
            raise UnreadableValue(f"is {value}, not a number")
        if number == number.to_integral_value():
            return str(int(value))
        return format(_without_noise(number), "f").rstrip("0")
    if isinstance(value, datetime) and value.time() == time() and value.tzinfo is None:
        return str(value.date())
    if isinstance(value, str) and SURROGATE.search(value):
        raise UnreadableValue("holds half of a surrogate pair, which is no character")
    if isinstance(value, str | int | date | time):
        return str(value)
    kind = "a table" if isinstance(value, Mapping) else f"a {type(value).__name__}"
    raise UnreadableValue(
        f"is {kind}, not a text: name one element (column.0, column.key) or a rule "
        "(first, last, join:X)"
    )


def _without_noise(number: Decimal) -> Decimal:
    """Return 0.3 for 0.30000000000000004, what binary fractions make of 0.1 + 0.2."""
    rounded = Context(prec=15).plus(number).normalize()
    return rounded if len(rounded.as_tuple().digits) <= MAX_DIGITS_OF_A_DECIMAL else number


def bad_row(row: Row, missing: MissingValue) -> DataError:
    """Build the error for a row that cannot be converted to a problem."""
    return DataError(f"{row.where}: {missing}")
