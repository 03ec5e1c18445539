"""Defines how a recipe names a part of one's own: a name that can be imported, and ``options``.

Wherever a recipe takes a ``type`` of ours, it takes the name of a user's part (`config.part_names`),
with ``options = { … }`` as the keyword arguments of that part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Annotated, Any

from pydantic import BeforeValidator, Discriminator, Field

from selfteach.config.part_names import BUILT_IN, CUSTOM, SPELLING, Kind, is_custom, unanchored
from selfteach.config.schema import Section


class CustomPart(Section):
    """Names a part of one's own."""

    type: str
    """``package.module:name``, ``./file.py:name`` relative to the recipe, or a plug-in's name."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the part, checked against its signature."""

    @property
    def label(self) -> str:
        """Return the name without the folder of a file, and the options."""
        name = unanchored({"type": self.type})["type"]
        options = ", ".join(f"{key}={value}" for key, value in self.options.items())
        return f"{name}({options})" if options else name


def custom_or(kind: Kind, ours: Sequence[str]) -> Discriminator:
    """Return the discriminator of a section: by its ``type`` if it is one of ours, else `CUSTOM`."""

    def tag(section: object) -> object:
        name = (
            section.get("type") if isinstance(section, Mapping) else getattr(section, "type", None)
        )
        return CUSTOM if name not in ours and is_custom(kind, name) else name

    return Discriminator(tag)  # type: ignore[arg-type]


def custom_name_or(kind: Kind, ours: Sequence[str]) -> Discriminator:
    """Return the discriminator of a value that is one of our names, or names a part of one's own."""

    def tag(value: object) -> str:
        name = value.get("type") if isinstance(value, Mapping) else getattr(value, "type", value)
        is_table = isinstance(value, CustomPart | Mapping)
        return CUSTOM if is_table or (name not in ours and is_custom(kind, name)) else BUILT_IN

    return Discriminator(tag)


def spelled_out(kind: Kind, ours: Sequence[str]) -> BeforeValidator:
    """Return the validator that reads the bare name of a part as a table without options."""

    def check(value: object) -> object:
        is_name = isinstance(value, str) and value not in ours and is_custom(kind, value)
        return {"type": value} if is_name else value

    return BeforeValidator(check)


def only_custom(kind: Kind) -> BeforeValidator:
    """Return the validator of a key that takes no name of ours: the problems have a part already."""

    def check(value: object) -> object:
        if isinstance(value, str) and not is_custom(kind, value):
            raise ValueError(f"these problems have their {kind}; one of your own is {SPELLING}")
        return {"type": value} if isinstance(value, str) else value

    return BeforeValidator(check)


CustomVerifier = Annotated[CustomPart | None, only_custom("verifier")]
CustomSplitter = Annotated[CustomPart | None, only_custom("splitter")]


PART_KEYS: Mapping[str, Kind] = {
    "data": "problems",
    "data.environment": "hub_environment",
    "data.verifier": "verifier",
    "data.steps": "splitter",
    "critic": "critic",
    "context": "context",
    "context.fallback": "context",
    "objective": "objective",
    "teacher": "teacher",
    "environment": "environment",
}
"""The keys of a recipe that may name one part, and its kind."""
REWARDS = "reward.functions"
"""The key of a recipe that may name several parts; ``reward.functions.0`` is the first of them."""


def named_parts(recipe: Any) -> dict[str, tuple[Kind, CustomPart]]:
    """Return the parts of one's own that a recipe names, by their key, like ``data.verifier``."""
    named: Mapping[str, Any] = {
        "data": recipe.data,
        "data.environment": getattr(recipe.data, "part", None),
        "data.verifier": getattr(recipe.data, "verifier", None),
        "data.steps": getattr(recipe.data, "steps", None),
        "critic": recipe.critic,
        "context": recipe.context.custom_part,
        "context.fallback": recipe.context.custom_fallback,
        "objective": recipe.objective,
        "teacher": recipe.teacher,
        "environment": recipe.environment,
    }
    parts: dict[str, tuple[Kind, CustomPart]] = {
        key: (PART_KEYS[key], part) for key, part in named.items() if isinstance(part, CustomPart)
    }
    rewards = enumerate(recipe.reward.functions if recipe.reward is not None else ())
    functions: dict[str, tuple[Kind, CustomPart]] = {
        f"{REWARDS}.{i}": ("reward", part) for i, part in rewards if isinstance(part, CustomPart)
    }
    return {**parts, **functions}


def part_keys(config: Mapping[str, Any]) -> list[str]:
    """Return the keys of a recipe's tables that may name a part."""
    reward = config.get("reward")
    functions = reward.get("functions", ()) if isinstance(reward, Mapping) else ()
    return [*PART_KEYS, *(f"{REWARDS}.{i}" for i in range(len(functions)))]


def part_name(config: Mapping[str, Any], key: str) -> Any:
    """Return what stands in a recipe's tables under a key of `part_keys`: a name, or something else."""
    first, *rest = key.split(".")
    value = config.get(first)
    for name in rest:
        if isinstance(value, Mapping):
            value = value.get(name)
        elif isinstance(value, list | tuple):
            value = value[int(name)]
    return value.get("type") if isinstance(value, Mapping) else value


def with_names(values: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Return a recipe's tables with other names for parts, by the keys of `part_keys`."""
    changed = deepcopy(dict(values))
    for key, name in names.items():
        *path, last = key.split(".")
        table: Any = changed
        for step in path:
            table = table[_index(table, step)]
        at: Any = _index(table, last)
        if isinstance(table[at], dict):
            table[at]["type"] = name
        else:
            table[at] = name
    return changed


def _index(table: Any, key: str) -> Any:
    """Return what a table or a list is indexed with for one part of a key."""
    return int(key) if isinstance(table, list) else key
