"""From a row to a `Problem`: which column is what, and the few rules that real data sets need."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from typing import Any, TypeVar

from selfteach.config.data_section import Columns, HubData, RowsData
from selfteach.config.schema import merge, nearest, validate
from selfteach.errors import DataError, RecipeError
from selfteach.tasks.sources.rows import Row
from selfteach.tasks.verifiers import last_boxed
from selfteach.types import Problem

FIELD = re.compile(r"\{([\w.]+)\}")
RULES = ("after:X", "before:X", "boxed", "first", "last", "join:X")
SOURCES = ("train", "validation", "test", "pool")
REFERENCES = ("reference", "aligned_reference")


R = TypeVar("R", bound=RowsData)


class Missing(Exception):
    """A row lacks what a column names; the message says what."""


@cache
def ready_mappings() -> Mapping[str, Mapping[str, Any]]:
    """The mappings that ship with the package, by name: see ``mappings.toml``."""
    text = resources.files("selfteach.tasks.sources").joinpath("mappings.toml").read_text("utf-8")
    return tomllib.loads(text)


def with_mapping(config: R) -> R:
    """The section with its ready-made mapping filled in; what the recipe says goes before it.

    Raises `RecipeError` for a mapping of another name.
    """
    if config.mapping is None:
        return config
    known = ready_mappings()
    if config.mapping not in known:
        raise RecipeError(f"data.mapping = {config.mapping!r}; {nearest(config.mapping, known)}")
    told = config.model_dump(exclude_unset=True)
    ready = {k: v for k, v in known[config.mapping].items() if k in type(config).model_fields}
    if "path" in told:
        ready.pop("name", None)  # a configuration of the mapping's own data set
    if not isinstance(config, HubData) or told.keys() & set(SOURCES):
        # The hub's splits; and whoever names one source means these and no others.
        ready = {k: v for k, v in ready.items() if k not in SOURCES}
    return validate(type(config), merge(ready, told), where="data")


def problem_from(row: Row, columns: Columns) -> Problem:
    """A row's problem. Raises `Missing` if it has no question or answer."""
    question = _wanted(row, columns.question, "question")
    answer = _wanted(row, columns.answer, "answer")
    named = {name: getattr(columns, name) for name in REFERENCES}
    references = {
        name: text
        for name, column in named.items()
        if (text := _optional(row, column or name, required=column is not None))
    }
    id_ = _optional(row, columns.id or "id", required=columns.id is not None)
    return Problem(id_ or row.name, question, answer, references, _meta(row, columns.meta))


def column_value(values: Mapping[str, Any], column: str) -> Any:
    """What a column spec says of a row: a path with rules, or a template.

    Raises `Missing`, or `RecipeError` for a rule that does not exist.
    """
    if FIELD.search(column):
        return FIELD.sub(lambda match: _text(_at(values, match[1])), column)
    path, *rules = re.split(r" *\| *", column)
    value = _at(values, path)
    for rule in rules:
        value = _apply(rule, value)
    return value


def _wanted(row: Row, column: str, name: str) -> str:
    text = _text(column_value(row.values, column)).strip()
    if not text:
        raise Missing(f"the {name} is empty")
    return text


def _optional(row: Row, column: str, *, required: bool) -> str | None:
    """A text that need not be there; a column that the recipe names must exist in every row."""
    try:
        return _text(column_value(row.values, column)).strip() or None
    except Missing:
        top = re.split(r"[.| {}]", column.lstrip("{"))[0]
        if required and top not in row.values:
            raise
        return None


def _meta(row: Row, meta: str | tuple[str, ...] | None) -> dict[str, Any]:
    if isinstance(meta, tuple):
        return {name: _plain(column_value(row.values, name)) for name in meta}
    table = row.values.get(meta or "meta")
    if meta is not None and not isinstance(table, Mapping):
        raise Missing(f"no table in column {meta!r}")
    return _plain(table) if isinstance(table, Mapping) else {}


def _plain(value: Any) -> Any:
    """As JSON gives it back, so that a problem is the same in memory and read from a file."""
    return json.loads(json.dumps(value, default=str))


def _at(values: Mapping[str, Any], path: str) -> Any:
    """Follow a dotted path through tables and lists; a column whose own name has dots goes first."""
    if path in values:
        return values[path]
    found: Any = values
    for part in path.split("."):
        if isinstance(found, Mapping) and part in found:
            found = found[part]
        elif isinstance(found, Sequence) and not isinstance(found, str) and _index(part, found):
            found = found[int(part)]
        else:
            known = list(found) if isinstance(found, Mapping) else []
            hint = f"; {nearest(part, known)}" if known else ""
            raise Missing(f"no column {path!r}{hint}")
    return found


def _index(part: str, values: Sequence[Any]) -> bool:
    return part.lstrip("-").isdigit() and -len(values) <= int(part) < len(values)


def _apply(rule: str, value: Any) -> Any:
    name, _, told = rule.partition(":")
    match name:
        case "after" | "before" if told:
            before, found, after = _text(value).rpartition(told)
            if not found:
                raise Missing(f"no {told!r} in it")
            return after if name == "after" else before
        case "boxed":
            boxed = last_boxed(_text(value))
            if boxed is None:
                raise Missing("no \\boxed{} in it")
            return boxed
        case "first" | "last":
            if not isinstance(value, Sequence) or isinstance(value, str) or not value:
                raise Missing(f"no list to take the {name} of")
            return value[0 if name == "first" else -1]
        case "join":
            if isinstance(value, str) or not isinstance(value, Sequence):
                raise Missing("no list to join")
            return told.join(map(_text, value))
        case _:
            raise RecipeError(f"data.columns: no rule {rule!r}; known: {', '.join(RULES)}")


def _text(value: Any) -> str:
    """A value as a person would write it: 3.0 as 3, true as true, None as nothing."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return str(int(value))
    if isinstance(value, Mapping | list | tuple):
        return json.dumps(value, default=str)
    return str(value)


def bad_row(row: Row, missing: Missing) -> DataError:
    """The error for a row that is no problem."""
    return DataError(f"{row.where}: {missing}")
