"""Resumes what a folder holds: a study, a sweep, a run or a selection."""

from __future__ import annotations

from pathlib import Path

from selfteach.commands import actions
from selfteach.config.data_section import SelectConfig
from selfteach.config.recipe import Recipe
from selfteach.config.schema import validate
from selfteach.errors import CheckpointError


def resume_folder(folder: Path, *, accept_parts: bool = False) -> None:
    """Resume what a folder holds; with ``accept_parts`` also if the user's own parts have changed.

    Raises `CheckpointError` for a folder that does not exist, or one of a forecast, which has no end to
    resume to.
    """
    if accept_parts:
        actions.accept_parts(folder)
    if (folder / "study.json").exists():
        from selfteach.commands.study.run_study import load_existing

        existing, command, kind = load_existing(folder)
        run = actions.run_sweep if kind == "sweep" else actions.run_study
        run(existing, folder, command=command)
    else:
        _resume_run(folder)


def _resume_run(folder: Path) -> None:
    from selfteach.runtime.run_folder import RunFolder

    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    config = RunFolder(folder).config()
    if "forecast" in config:
        raise CheckpointError(
            f"{folder} holds a forecast: repeat its selfteach forecast command to continue it"
        )
    if "select" in config:
        select_config = validate(SelectConfig, config["select"], where=str(folder))
        recipe = validate(Recipe, config["recipe"], where=str(folder))
        actions.run_selection(recipe, select_config, folder)
    else:
        actions.run_one(validate(Recipe, config, where=str(folder)), folder)
