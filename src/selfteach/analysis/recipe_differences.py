"""Find what differs between the runs that a report compares: recipes and environments."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from selfteach.analysis.run_data import Groups, RunData, read_json

NOT_COMPARED = ("seed", "tracking")
"""Sections of a recipe that differ between runs of one arm, or change nothing that is measured."""
UNSET = "–"
"""A setting that an arm's recipe does not have, as one of another objective."""
LONGEST_VALUE = 160
"""Characters of a value in the table; the run folder has the whole value."""


@dataclass(frozen=True, slots=True)
class Differences:
    """Holds the settings in which arms differ: a row per setting, a column per arm."""

    arms: Sequence[str]
    rows: Mapping[str, Sequence[str]]
    """Values by setting, in the order of ``arms``."""
    same: int
    """Settings that are the same in all arms."""


def differences(groups: Groups) -> Differences | None:
    """Return what differs between arms, by their recipes and environments; None for a single arm."""
    if len(groups) < 2:
        return None
    columns = [_settings(runs) for runs in groups.values()]
    keys = list(dict.fromkeys(key for column in columns for key in column))
    # A section that is unset in one arm and filled in another: its settings say so.
    keys = [key for key in keys if not any(other.startswith(f"{key}.") for other in keys)]
    values = {key: [column.get(key, UNSET) for column in columns] for key in keys}
    rows = {key: row for key, row in values.items() if len(set(row)) > 1}
    return Differences(list(groups), rows, len(keys) - len(rows))


def _settings(runs: Sequence[RunData]) -> dict[str, str]:
    """Return an arm's settings by dotted key, as text, then its runs' environments."""
    recipe = {key: value for key, value in runs[0].config.items() if key not in NOT_COMPARED}
    settings = {key: _text(value) for key, value in _flat(recipe)}
    made: dict[str, dict[str, None]] = {}
    for run in runs:
        path = run.folder / "environment.json"
        for key, value in _flat(read_json(path) if path.exists() else {}):
            made.setdefault(f"made with {key.removeprefix('versions.')}", {})[_text(value)] = None
    return {**settings, **{key: " and ".join(values) for key, values in made.items()}}


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Return leaves by dotted key; a section that is unset or empty is a leaf."""
    leaves: list[tuple[str, Any]] = []
    for key, value in values.items():
        inner = isinstance(value, Mapping) and value
        leaves += _flat(value, f"{prefix}{key}.") if inner else [(f"{prefix}{key}", value)]
    return leaves


def _text(value: Any) -> str:
    if value is None:
        return "not set"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}…"
