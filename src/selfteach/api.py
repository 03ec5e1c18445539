"""Import this in a notebook: load recipes, build components, train steps, evaluate and inspect models.

Each name is also public where it is defined. Paths may be `str` or `pathlib.Path`.

    recipe = load_recipe("recipe.toml", arm="step_aligned", settings=["train.steps=10"])
    train(recipe, "runs/first", components={"critic": MyCritic()})["curve"]
    built = build(recipe)
    samples, metrics = train_step(built.components, built.task.train[:4])
    evaluate("runs/first", problems="test", k=12)["avg"]
    forecast_recipe("recipe.toml")["arms"]["step_aligned"]["verdict"]
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from selfteach.commands.actions import load, one_run
from selfteach.commands.evaluate import evaluate_model as evaluate
from selfteach.commands.forecast.collection import ForecastRequest
from selfteach.commands.forecast.run_forecast import forecast
from selfteach.commands.inspect.inspection import InspectionRequest
from selfteach.commands.inspect.inspection import inspect_model as inspect
from selfteach.commands.train_with_parts import build_with as build
from selfteach.commands.train_with_parts import train
from selfteach.config.recipe import Recipe
from selfteach.trainer.step import train_step

__all__ = [
    "ForecastRequest",
    "InspectionRequest",
    "Recipe",
    "build",
    "evaluate",
    "forecast_recipe",
    "inspect",
    "load_recipe",
    "train",
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


def forecast_recipe(
    path_or_name: str | Path,
    request: ForecastRequest | None = None,
    *,
    arms: Sequence[str] = (),
    settings: Sequence[str] = (),
    out: str | Path | None = None,
) -> dict[str, Any]:
    """Forecast what a recipe's arms can teach, as `selfteach forecast` does; return ``forecast.json``.

    ``arms`` are all by default; what is sampled is kept in ``out``. Raises one of `selfteach.errors`.
    """
    request = request or ForecastRequest()
    study = load(Path(path_or_name), settings)
    recipes = {arm: study.recipe(arm, seed=request.seed) for arm in arms or study.arms}
    return forecast(recipes, request, None if out is None else Path(out))
