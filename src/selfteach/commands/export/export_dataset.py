"""Exports a run or a file of critiques as another trainer's data set."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from selfteach.commands import actions
from selfteach.commands.critique import recipe_beside, recipe_of
from selfteach.commands.export.exported_rollouts import (
    ContextSource,
    rollouts_of_file,
    rollouts_of_run,
    run_recipe,
)
from selfteach.commands.export.trainer_formats import (
    FORMATS,
    DatasetCounts,
    Format,
    require_new,
    write_dataset,
)
from selfteach.config.recipe import CONTEXTS
from selfteach.errors import DataError, RecipeError
from selfteach.prompts.chat_messages import MessageRenderer


@dataclass(frozen=True, slots=True)
class DatasetRequest:
    """Says what to export, where to, and as which trainer's data set."""

    source: Path
    """Run folder, or file of critiques."""
    form: str
    """One of `FORMATS`."""
    out: Path
    recipe: Path | None = None
    """Recipe of a file of critiques; None: that of the run that holds the file."""
    arm: str | None = None
    context: str | None = None
    """Context to render in place of the recipe's."""
    with_all: bool = False
    """Also write rollouts without a teacher context."""
    data_source: str = "selfteach"
    settings: tuple[str, ...] = ()


def export(request: DatasetRequest) -> DatasetCounts:
    """Write the data set and return counts. Raises one of `selfteach.errors` in one line."""
    if request.form not in FORMATS:
        raise RecipeError(f"--format {request.form!r}: one of {', '.join(FORMATS)}")
    require_new(request.out)
    settings = request.settings
    if request.context is not None:
        if request.context not in CONTEXTS or request.context == "none":
            names = ", ".join(name for name in CONTEXTS if name != "none")
            raise RecipeError(f"--context {request.context!r}: one of {names}")
        settings = (*settings, f"context.type={json.dumps(request.context)}")
    path, again = request.source, request.context is not None
    if path.is_dir():
        if request.recipe is not None:
            raise RecipeError(f"--recipe: {path} is a run, which has its recipe; use --set")
        source = ContextSource(run_recipe(path, settings), again=again)
        groups = rollouts_of_run(path, source)
    elif not path.exists():
        raise DataError(f"{path}: no such run folder or file of critiques")
    else:
        if request.recipe is not None:
            study = actions.load(request.recipe, list(settings), request.arm)
            recipe = recipe_of(study, request.arm)
        else:
            recipe = recipe_beside(path, list(settings))
        source = ContextSource(recipe, again=again)
        groups = rollouts_of_file(path, source)
    if source.recipe.environment is not None:
        raise RecipeError(
            f"{path}: its rollouts are episodes with an environment, which no format of other trainers "
            "holds: selfteach inspect and the folder's rollouts/ have them"
        )
    model = source.recipe.model
    renderer = MessageRenderer(
        source.templates, system=model.system, teacher_system=model.teacher_system
    )
    return write_dataset(
        groups,
        request.out,
        cast(Format, request.form),
        renderer,
        data_source=request.data_source,
        with_all=request.with_all,
    )
