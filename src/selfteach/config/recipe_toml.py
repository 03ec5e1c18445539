"""Writes a run's resolved recipe as a recipe file, so that another run can start from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tomli_w


def is_recipe(config: Mapping[str, Any]) -> bool:
    """Return whether a folder's config is the recipe of a run, and not of a selection or a forecast."""
    return {"model", "data", "train"} <= config.keys()


def recipe_toml(config: Mapping[str, Any]) -> str:
    """Return a resolved recipe as TOML. Its seed is in a comment: the command line sets it.

    TOML has no null: a key without a value is left out, which means the same.
    """
    values = {name: value for name, value in config.items() if name != "seed"}
    head = f"# selfteach train recipe.toml --seed {config['seed']} --out NEW_FOLDER\n\n"
    return head + tomli_w.dumps(_without_nulls(values))


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list | tuple):
        return [_without_nulls(inner) for inner in value]
    return value
