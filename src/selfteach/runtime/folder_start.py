"""Decide whether a run may begin in a folder: a start that has spent nothing does not occupy it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from selfteach.config.recipe_toml import is_recipe, recipe_toml
from selfteach.errors import CheckpointError
from selfteach.runtime.atomic_files import write_text
from selfteach.runtime.part_sources import portable
from selfteach.runtime.stored_files import read_json

START_FILES = {
    ".lock", ".identity", "config.json", "recipe.toml", "environment.json", "study.json",
    "problems.json", "tracking.json", "checksums.jsonl", "parts.json",
}  # fmt: skip
"""Files that are written before anything is sampled."""
BEFORE_CONFIG = {".lock", "environment.json"}
"""Files that may be in a folder whose start was killed before its config.json or study.json."""
START_FOLDERS = {"tensorboard", "wandb", "parts"}
"""Folders of tracking sinks and of copies of parts, written before anything is sampled."""


def holds_work(folder: Path) -> bool:
    """Return True if a folder or one below it holds more than what a start writes."""
    for child in folder.iterdir():
        if child.is_dir():
            if child.name not in START_FOLDERS and holds_work(child):
                return True
        elif child.name == "metrics.jsonl":
            if child.stat().st_size > 0:
                return True
        elif child.suffix != ".tmp" and child.name not in START_FILES:
            return True
    return False


def require_empty(path: Path) -> None:
    """Raise `CheckpointError` if a new run's folder is a file, or holds what no failed start left."""
    if path.is_file():
        raise CheckpointError(f"--out {path} is a file; name a new or an empty folder")
    try:
        others = path.is_dir() and any(not _left_by_a_start(child) for child in path.iterdir())
    except OSError as error:
        raise CheckpointError(f"--out {path} cannot be read: {error.strerror}") from None
    if others:
        raise CheckpointError(f"--out {path} is not empty; name a new or an empty folder")


def is_our_config(config: Mapping[str, Any]) -> bool:
    """Return True for the config.json of a run, a selection or a forecast."""
    return "select" in config or "forecast" in config or {"model", "data", "train"} <= config.keys()


def write_recipe(folder: Path, config: Mapping[str, Any]) -> None:
    """Write a run's recipe.toml unless it is there, or the folder is a selection's or a forecast's."""
    if is_recipe(config) and not (folder / "recipe.toml").exists():
        write_text(folder / "recipe.toml", recipe_toml(portable(config)))


def clear_start(folder: Path) -> None:
    """Remove what starts have left in a folder that holds no work, except its lock."""
    assert not holds_work(folder)
    for child in folder.iterdir():
        if child.is_dir():
            shutil.rmtree(child)
        elif child.name != ".lock" and child.name.removesuffix(".tmp") in START_FILES:
            child.unlink()


def _left_by_a_start(path: Path) -> bool:
    """Return True for a file that a start writes before its config.json, or had not finished."""
    name = path.name.removesuffix(".tmp")
    if path.is_dir() or name not in START_FILES:
        return False
    if path.name.endswith(".tmp") or name in (".lock", ".identity"):
        return True
    return name in BEFORE_CONFIG and "versions" in read_json(path)
