"""Import this in a notebook: load recipes, build components, train steps, evaluate and inspect models.

Each name is also public where it is defined. Paths may be `str` or `pathlib.Path`.

    recipe = load_recipe("recipe.toml", arm="step_aligned", settings=["train.steps=10"])
    built = build(recipe)
    samples, metrics = train_step(built.components, built.task.train[:4])
    evaluate("runs/first", problems="test", k=12)["avg"]
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from selfteach.commands.actions import load, one_run
from selfteach.commands.evaluate import evaluate_model as evaluate
from selfteach.commands.inspect.inspection import InspectionRequest
from selfteach.commands.inspect.inspection import inspect_model as inspect
from selfteach.config.recipe import Recipe
from selfteach.trainer.build import build
from selfteach.trainer.step import train_step

__all__ = [
    "InspectionRequest",
    "Recipe",
    "build",
    "evaluate",
    "inspect",
    "load_recipe",
    "train_step",
]


def load_recipe(
    path_or_name: str | Path,
    arm: str | None = None,
    seed: int = 0,
    settings: Sequence[str] = (),
) -> Recipe:
    """Load the recipe of one run from a TOML file, or by the name of a recipe shipped with the package.

    ``arm`` may be omitted if the recipe has one arm; ``settings`` are ``key=value`` strings, like
    ``--set`` of the command line. Raises `RecipeError` in one line.
    """
    return one_run(load(Path(path_or_name), settings, arm), arm, seed)
