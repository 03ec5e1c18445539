"""Defines strict sections, merges nested overrides, and reports each error in one line."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from selfteach.config.foreign_names import hint_for
from selfteach.config.migrations import migrate_recipe_file
from selfteach.config.part_names import BUILT_IN, CUSTOM, SPELLING, anchored
from selfteach.errors import RecipeError

M = TypeVar("M", bound=BaseModel)


class Section(BaseModel):
    """Is the base of all sections of a recipe: unknown keys are refused, values are immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def merge(low: Mapping[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    """Merge nested tables, ``high`` over ``low``; a table with another ``type`` replaces the whole."""
    if "type" in high and "type" in low and high["type"] != low["type"]:
        return deepcopy(dict(high))
    merged = deepcopy(dict(low))
    for key, value in high.items():
        below = merged.get(key)
        if isinstance(value, Mapping) and isinstance(below, Mapping):
            merged[key] = merge(below, value)
        else:
            merged[key] = deepcopy(value)
    return merged


def parse_setting(setting: str) -> dict[str, Any]:
    """Parse ``a.b=3`` into nested tables; the value is TOML, or a string if it is not valid TOML.

    The file of a part is relative to the working directory. Keys with an old name get the
    new one. Raises `RecipeError` for a setting without key or value.
    """
    key, equals, text = setting.partition("=")
    if not equals or not key.strip():
        raise RecipeError(
            f"--set {setting!r}: write key=value, for example --set optimizer.lr=5e-4"
        )
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    first, *inner = key.strip().split(".")
    for part in reversed(inner):
        value = {part: value}
    return migrate_recipe_file(anchored({first: value}, Path.cwd()), "--set")


def validate(model: type[M], values: Mapping[str, Any], *, where: str = "") -> M:
    """Validate ``values``, turning pydantic's report into one line that names the nearest valid key.

    Raises `RecipeError`; the line begins with ``where``.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        line = _one_line(model, error)
        raise RecipeError(f"{where}: {line}" if where else line) from None


def nearest(word: str, choices: Mapping[str, Any] | Sequence[str]) -> str:
    """Return a hint for an error message: the choice most like ``word``, or all of them."""
    names = list(choices)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names)}"


def _one_line(model: type[BaseModel], error: ValidationError) -> str:
    first, count = error.errors()[0], error.error_count()
    path, owners = _walk(model, first["loc"])
    more = f" (and {count - 1} more)" if count > 1 else ""
    if first["type"] == "extra_forbidden":
        keys, key = [name for owner in owners for name in owner.model_fields], str(first["loc"][-1])
        if keys == ["type", "options"]:
            section = path.rpartition(".")[0]
            return f"unknown key {path!r}; arguments of a part of your own: {section}.options{more}"
        return f"unknown key {path!r}; {hint_for(key) or nearest(key, keys)}{more}"
    if first["type"] == "union_tag_invalid":
        return f"{_unknown_type(path, first.get('ctx', {}))}{more}"
    message = first["msg"].removeprefix("Value error, ")
    if BUILT_IN in first["loc"] and first["type"] == "literal_error":
        message += f", or a part of your own, {SPELLING}"
    value = "" if isinstance(first["input"], dict | BaseModel) else f", found {first['input']!r}"
    return f"{path + ': ' if path else ''}{message[0].lower() + message[1:]}{value}{more}"


def _unknown_type(path: str, context: Mapping[str, Any]) -> str:
    """Return the line for a ``type`` that is none of ours, and names no part of the user's."""
    tag = str(context["tag"])
    ours = [name for name in re.findall(r"'([^']*)'", context["expected_tags"]) if name != CUSTOM]
    close = difflib.get_close_matches(tag, ours, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(map(repr, ours))}"
    return f"{path}.type = {tag!r}: {hint}; a part of your own is {SPELLING}"


def _walk(
    model: type[BaseModel], loc: Sequence[int | str]
) -> tuple[str, Sequence[type[BaseModel]]]:
    """Return the dotted key of an error's location as a user writes it, and the sections that hold it.

    pydantic puts the ``type`` of a section into the location; a recipe does not.
    """
    owners: list[type[BaseModel]] = [model]
    written: list[str] = []
    for at, part in enumerate(loc):
        tagged = [owner for owner in owners if _tag(owner) == part]
        if at > 0 and (tagged or part in (BUILT_IN, CUSTOM)):
            owners = tagged or owners
            continue
        written.append(str(part))
        fields = [owner.model_fields[str(part)] for owner in owners if part in owner.model_fields]
        inner = [section for field in fields for section in _models_in(field.annotation)]
        owners = inner if inner and at < len(loc) - 1 else owners
    return ".".join(written), owners


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for part in getattr(annotation, "__args__", ()) for m in _models_in(part)]


def _tag(model: type[BaseModel]) -> object:
    field = model.model_fields.get("type")
    if field is not None and field.annotation is str:
        return CUSTOM
    return getattr(field.annotation, "__args__", (None,))[0] if field else None
