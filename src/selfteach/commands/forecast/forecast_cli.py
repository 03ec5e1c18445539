"""Define the options of `selfteach forecast`; torch is imported when the command runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from selfteach.commands import actions


def forecast(
    recipe: Annotated[
        Path, typer.Argument(help="TOML file, or the name of a shipped recipe (selfteach recipes).")
    ],
    k: Annotated[
        int, typer.Option("--answers", "-k", min=2, help="Rollouts per validation problem.")
    ] = 4,
    problems: Annotated[
        int, typer.Option("--problems", "--limit", min=1, help="Use the first N problems.")
    ] = 24,
    teacher_answers: Annotated[
        int, typer.Option(min=1, help="Answers the teacher samples per rollout and context.")
    ] = 1,
    arm: Annotated[
        list[str] | None, typer.Option(help="Forecast this arm only; repeatable. Default: all.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of sampling.")] = 0,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="Keep rollouts, critiques and forecast.json here; a second call samples only what is "
            "missing.",
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Override a value in every arm; repeatable.",
        ),
    ] = None,
) -> None:
    """Measure the untrained model and say which arms can be expected to teach. Trains nothing.

    Samples a few dozen rollouts, critiques them, lets each arm's teacher answer with the context in
    view, and measures what a step costs.
    """
    loaded = actions.load(recipe, settings)
    recipes = {name: loaded.recipe(name, seed=seed) for name in arm or loaded.arms}
    actions.require_models(recipes.values(), out)

    from selfteach.analysis.terminal.forecast_tables import print_forecast
    from selfteach.commands.forecast.collection import ForecastRequest
    from selfteach.commands.forecast.run_forecast import forecast as run
    from selfteach.commands.progress import forecast_progress

    request = ForecastRequest(problems, k, seed, teacher_answers)
    with forecast_progress() as progress:
        result = run(recipes, request, out, progress)
    print_forecast(result, actions.console())
    if out is not None:
        typer.echo(f"forecast: {out / 'forecast.json'}")
