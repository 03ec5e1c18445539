"""Run a recipe whose parts are objects from Python: a notebook's critic, verifier or objective."""

from __future__ import annotations

import functools
import inspect
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from selfteach.commands.actions import load, one_run
from selfteach.config.part_names import Kind, is_custom
from selfteach.config.part_section import PART_KEYS, REWARDS
from selfteach.config.recipe import Recipe
from selfteach.config.schema import merge, nearest, validate
from selfteach.errors import PartError
from selfteach.runtime.distributed import SINGLE_PROCESS, Ranks
from selfteach.runtime.part_sources import accept_sources
from selfteach.runtime.parts import given_parts
from selfteach.trainer.build import Built, build
from selfteach.trainer.loop import run_to_end

Components = Mapping[str, Any]
KEYS: Mapping[str, str] = {
    **{kind: key for key, kind in reversed(list(PART_KEYS.items()))},
    "reward": REWARDS,
}
"""The key of a recipe that names a part, by its kind."""


def recipe_with(
    recipe: Recipe | str | Path,
    components: Components,
    *,
    arm: str | None = None,
    seed: int = 0,
    settings: Sequence[str] = (),
) -> tuple[Recipe, dict[tuple[Kind, str], Any]]:
    """Return a recipe that names the objects of ``components``, and the objects by kind and name.

    Raises `PartError` for a kind that does not exist, `RecipeError` where the recipe takes none of it.
    """
    named: dict[tuple[Kind, str], Any] = {}
    single = [(kind, part) for kind, parts in components.items() for part in _listed(kind, parts)]
    for kind, part in single:
        if kind not in KEYS:
            raise PartError(f"components[{kind!r}]: no such kind; {nearest(kind, list(KEYS))}")
        if (_as_kind(kind), _name_of(part)) in named:
            raise PartError(
                f"components[{kind!r}]: two are named {_name_of(part)!r}: give each a name with def"
            )
        named[_as_kind(kind), _name_of(part)] = (
            _callable_problems(part) if kind == "problems" else part
        )
    names: dict[str, Any] = {KEYS[kind]: name for kind, name in named if kind != "reward"}
    if rewards := [name for kind, name in named if kind == "reward"]:
        names[REWARDS] = rewards
    if isinstance(recipe, Recipe):
        values = recipe.model_dump(mode="json")
        for key, name in names.items():
            values = merge(values, _table(key, name))
        return validate(Recipe, values, where="recipe"), named
    chosen = [f"{_setting(key)}={json.dumps(name)}" for key, name in names.items()]
    return one_run(load(Path(recipe), [*settings, *chosen], arm), arm, seed), named


def train(
    recipe: Recipe | str | Path,
    folder: str | Path,
    *,
    components: Components | None = None,
    arm: str | None = None,
    seed: int = 0,
    settings: Sequence[str] = (),
    accept_parts: bool = False,
) -> dict[str, Any]:
    """Run a recipe in a folder to its end, or resume the run that the folder holds; return its result.

    ``components`` are objects in place of parts of the recipe, by their kind: ``problems`` (also a
    table of lists by split), ``verifier``, ``splitter``, ``critic``, ``context``, ``objective``,
    ``teacher``, ``hub_environment``, ``reward`` (a function, or a list of them). ``arm``, ``seed`` and
    ``settings`` choose the run of a recipe file, as for `selfteach.api.load_recipe`. A folder that was
    begun with objects is resumed with them, with ``accept_parts`` also if their source has changed.
    Raises one of `selfteach.errors`.
    """
    chosen, named = recipe_with(recipe, components or {}, arm=arm, seed=seed, settings=settings)
    if accept_parts:
        accept_sources(Path(folder), given=True)
    with given_parts(named):
        return run_to_end(chosen, Path(folder))


def build_with(
    recipe: Recipe, components: Components | None = None, ranks: Ranks = SINGLE_PROCESS
) -> Built:
    """Build a recipe's components, with objects from Python in place of parts, as `train` does."""
    chosen, named = recipe_with(recipe, components or {})
    with given_parts(named):
        return build(chosen, ranks)


def _as_kind(kind: str) -> Kind:
    return next(known for known in get_args(Kind) if known == kind)


def _name_of(part: Any) -> str:
    """Return a name in the spelling of parts, to be recorded: the module and the class or function."""
    while isinstance(part, functools.partial):
        part = part.func
    target = part if inspect.isroutine(part) or inspect.isclass(part) else type(part)
    module, name = str(target.__module__), re.sub(r"\W", "_", target.__name__)
    return f"{module}:{name}" if is_custom("critic", f"{module}:{name}") else f"given:{name}"


def _callable_problems(part: Any) -> Any:
    """Return a part that is called with a split; a table of lists is one."""
    return _OfTable(part) if isinstance(part, Mapping) else part


class _OfTable:
    """Returns the problems or rows of a split from a table."""

    def __init__(self, table: Mapping[str, Sequence[Any]]) -> None:
        self._table = table

    def __call__(self, split: str) -> list[Any]:
        return list(self._table.get(split, ()))


def _listed(kind: str, parts: Any) -> list[Any]:
    """Return the parts of a kind: one, or several reward functions."""
    return list(parts) if kind == "reward" and isinstance(parts, list | tuple) else [parts]


def _table(key: str, name: Any) -> dict[str, Any]:
    section, _, inner = key.partition(".")
    if key == REWARDS:
        return {section: {inner: [{"type": one} for one in name]}}
    if key == "data.environment":
        return {section: {inner: name}}
    return {section: {inner: {"type": name}}} if inner else {section: {"type": name}}


def _setting(key: str) -> str:
    return key if "." in key else f"{key}.type"
