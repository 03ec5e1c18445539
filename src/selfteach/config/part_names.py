"""Recognises how a recipe spells a part of one's own, and anchors the files that it names.

``package.module:name``, ``./file.py:name`` (a path relative to the recipe), or a name that an installed
package offers by an entry point of the group of its kind, like ``selfteach.critics``. Nothing is
imported here: `runtime.parts` does.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Literal

Kind = Literal[
    "problems",
    "verifier",
    "splitter",
    "reward",
    "critic",
    "context",
    "objective",
    "teacher",
    "environment",
    "hub_environment",
]
GROUPS: Mapping[Kind, str] = {
    "problems": "selfteach.problems",
    "hub_environment": "selfteach.hub_environments",
    "verifier": "selfteach.verifiers",
    "splitter": "selfteach.splitters",
    "reward": "selfteach.rewards",
    "critic": "selfteach.critics",
    "context": "selfteach.contexts",
    "objective": "selfteach.objectives",
    "teacher": "selfteach.teachers",
    "environment": "selfteach.environments",
}
"""The entry-point group of each kind."""
IN_FILE = re.compile(r"(?P<place>[^\n]*\.py):(?P<name>[^\W\d]\w*(?:\.[^\W\d]\w*)*)")
"""Matches ``./file.py:name``."""
IN_MODULE = re.compile(
    r"(?P<place>[^\W\d]\w*(?:\.[^\W\d]\w*)*):(?P<name>[^\W\d]\w*(?:\.[^\W\d]\w*)*)"
)
"""Matches ``package.module:name``."""
SPELLING = "package.module:name or ./file.py:name"
BUILT_IN, CUSTOM = "built in", "custom"
"""Tags of the two alternatives: one of ours, or a part of the user's."""
NAMING_KEYS = frozenset({"type", "fallback", "verifier", "steps", "environment"})
"""Keys of a recipe whose value may name a part."""
NAMES_KEY = "functions"
"""Key of a recipe whose value is a list of parts: ``reward.functions``."""


def is_custom(kind: Kind, name: object) -> bool:
    """Return True for the spelling of a part of one's own, or the name of an installed plug-in's."""
    if not isinstance(name, str):
        return False
    if ":" in name:
        return bool(IN_FILE.fullmatch(name) or IN_MODULE.fullmatch(name))
    return name in entry_points(group=GROUPS[kind]).names


def anchored(values: Any, folder: Path) -> Any:
    """Return a recipe's tables with the files of parts as absolute paths, relative to ``folder``."""
    return _renamed(values, lambda path: str(_absolute(folder, path)))


def unanchored(values: Any) -> Any:
    """Return a recipe's tables with the files of parts by their names alone: no folder of a machine."""
    return _renamed(values, lambda path: Path(path).name)


def _absolute(folder: Path, path: str) -> Path:
    return (folder / Path(path).expanduser()).resolve()


def _renamed_entry(value: Any, rename: Callable[[str], str]) -> Any:
    """Return an entry of a list of parts renamed: a table, or a bare name."""
    entry = {"type": value} if isinstance(value, str) else value
    renamed = _renamed(entry, rename)
    return renamed["type"] if isinstance(value, str) else renamed


def _renamed(values: Any, rename: Callable[[str], str]) -> Any:
    """Return the same values with the file in every part's name renamed; options stay as they are."""
    if isinstance(values, list | tuple):
        return [_renamed(value, rename) for value in values]
    if not isinstance(values, Mapping):
        return values
    renamed = {}
    for key, value in values.items():
        match = IN_FILE.fullmatch(value) if isinstance(value, str) else None
        if key == NAMES_KEY and isinstance(value, list | tuple):
            renamed[key] = [_renamed_entry(one, rename) for one in value]
        elif key == "options":
            renamed[key] = value
        elif match and key in NAMING_KEYS:
            renamed[key] = f"{rename(match['place'])}:{match['name']}"
        else:
            renamed[key] = _renamed(value, rename)
    return renamed
