"""Open a run, a checkpoint or a plain model by the name a user gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from selfteach.config.recipe import Recipe
from selfteach.config.schema import merge, validate
from selfteach.errors import CheckpointError, DataError
from selfteach.runtime.part_sources import with_copies
from selfteach.runtime.run_folder import RunFolder
from selfteach.tasks.sources.load import read_file
from selfteach.tasks.sources.rows import KINDS, is_problem_source
from selfteach.trainer import checkpoint
from selfteach.trainer.build import Built, build
from selfteach.trainer.fit_checks import drops_overlong, log_overlong, within_context
from selfteach.types import Problem


def open_model(
    path: Path, what: str, recipe: Recipe | None, adapt: Callable[[Recipe], Recipe] = lambda r: r
) -> tuple[Built, Recipe]:
    """Build the components of a run, a checkpoint or a model; ``adapt`` changes the recipe last."""
    if (path / "state.json").exists():
        return _from_checkpoint(path, path.parent.parent, recipe, adapt)
    if (path / "study.json").exists():
        raise CheckpointError(f"{path} is a study; name one of its runs, {path}/runs/ARM/seed_N")
    if (path / "environment.json").exists():
        saved = checkpoint.checkpoints(RunFolder(path).checkpoints)
        if not saved:
            raise CheckpointError(f"{path} has no checkpoint yet")
        return _from_checkpoint(saved[-1], path, recipe, adapt)
    resolved = recipe or Recipe.model_validate({"train": {"steps": 0}})
    changed = {"model": {"path": what}, "train": {"steps": 0}}
    resolved = validate(Recipe, merge(resolved.model_dump(mode="json"), changed), where="recipe")
    resolved = adapt(resolved)
    return build(resolved).for_measuring(), resolved


def _from_checkpoint(
    saved: Path, run: Path, recipe: Recipe | None, adapt: Callable[[Recipe], Recipe]
) -> tuple[Built, Recipe]:
    trained = with_copies(validate(Recipe, RunFolder(run).config(), where=str(run)), run)
    resolved = adapt(recipe.model_copy(update={"model": trained.model}) if recipe else trained)
    built = build(resolved).for_measuring()
    checkpoint.verify(saved)
    checkpoint.load_weights(saved, built.components.policy)
    return built, resolved


def named_problems(built: Built, name: str, recipe: Recipe) -> tuple[tuple[Problem, ...], str]:
    """Return the problems of a split or a file, and the name to record. Raises `DataError`.

    Overlong prompts of a file are left out and logged if ``data.overlong`` of the recipe says so.
    """
    if name in ("train", "validation", "test"):
        return built.task.problems(name), name
    path = Path(name)
    if not is_problem_source(path):
        raise DataError(f"--problems {name!r}: expected train, validation, test, or a {KINDS}")
    needs_answers = recipe.reward is None or recipe.reward.needs_answers
    problems = read_file(path, need_answers=needs_answers)
    task = replace(built.task, train=(), validation=(), test=problems, counts={})
    if drops_overlong(recipe):
        components = built.components
        task = within_context(components.renderer, task, components.max_length, recipe)
        log_overlong(task)
    return task.test, path.stem
