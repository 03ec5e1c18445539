"""Defines how a recipe names a part of one's own: a name that can be imported, and ``options``.

Wherever a recipe takes a ``type`` of ours, it takes the name of a user's part (`config.part_names`),
with ``options = { … }`` as the keyword arguments of that part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import BeforeValidator, Discriminator, Field

from selfteach.config.part_names import OURS, OWN, SPELLING, Kind, is_own, unanchored
from selfteach.config.schema import Section


class OwnPart(Section):
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


def own_or(kind: Kind, ours: Sequence[str]) -> Discriminator:
    """Return the discriminator of a section: by its ``type`` if it is one of ours, else `OWN`."""

    def tag(section: object) -> object:
        name = (
            section.get("type") if isinstance(section, Mapping) else getattr(section, "type", None)
        )
        return OWN if name not in ours and is_own(kind, name) else name

    return Discriminator(tag)  # type: ignore[arg-type]


def own_name_or(kind: Kind, ours: Sequence[str]) -> Discriminator:
    """Return the discriminator of a value that is one of our names, or names a part of one's own."""

    def tag(value: object) -> str:
        name = value.get("type") if isinstance(value, Mapping) else getattr(value, "type", value)
        is_table = isinstance(value, OwnPart | Mapping)
        return OWN if is_table or (name not in ours and is_own(kind, name)) else OURS

    return Discriminator(tag)


def spelled_out(kind: Kind, ours: Sequence[str]) -> BeforeValidator:
    """Return the validator that reads the bare name of a part as a table without options."""

    def check(value: object) -> object:
        is_name = isinstance(value, str) and value not in ours and is_own(kind, value)
        return {"type": value} if is_name else value

    return BeforeValidator(check)


def only_own(kind: Kind) -> BeforeValidator:
    """Return the validator of a key that takes no name of ours: the problems have a part already."""

    def check(value: object) -> object:
        if isinstance(value, str) and not is_own(kind, value):
            raise ValueError(f"these problems have their {kind}; one of your own is {SPELLING}")
        return {"type": value} if isinstance(value, str) else value

    return BeforeValidator(check)


OwnVerifier = Annotated[OwnPart | None, only_own("verifier")]
OwnSplitter = Annotated[OwnPart | None, only_own("splitter")]


PART_KEYS: Mapping[str, Kind] = {
    "data": "problems",
    "data.verifier": "verifier",
    "data.steps": "splitter",
    "critic": "critic",
    "context": "context",
    "context.fallback": "context",
    "objective": "objective",
    "teacher": "teacher",
}
"""The keys of a recipe that may name a part, and its kind."""


def named_parts(recipe: Any) -> dict[str, tuple[Kind, OwnPart]]:
    """Return the parts of one's own that a recipe names, by their key, like ``data.verifier``."""
    named: Mapping[str, Any] = {
        "data": recipe.data,
        "data.verifier": getattr(recipe.data, "verifier", None),
        "data.steps": getattr(recipe.data, "steps", None),
        "critic": recipe.critic,
        "context": recipe.context.own_part,
        "context.fallback": recipe.context.own_fallback,
        "objective": recipe.objective,
        "teacher": recipe.teacher,
    }
    return {key: (PART_KEYS[key], part) for key, part in named.items() if isinstance(part, OwnPart)}


def with_names(values: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Return a recipe's tables with other names for parts, by the keys of `named_parts`."""
    changed = {
        key: dict(value) if isinstance(value, Mapping) else value for key, value in values.items()
    }
    for key, name in names.items():
        section, _, inner = key.partition(".")
        if not inner:
            changed[section]["type"] = name
        elif isinstance(table := changed[section].get(inner), Mapping):
            changed[section][inner] = {**table, "type": name}
        else:
            changed[section][inner] = name
    return changed
