"""What commands do: runs with their bars, and what is said at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from selfteach.config.data_section import SelectConfig
from selfteach.config.recipe import Recipe
from selfteach.config.recipe_file import TABLES, Study, load_study
from selfteach.errors import RecipeError
from selfteach.runtime import torchrun

PIPED_COLUMNS = 110
"""Width of what is printed into a file or a pipe, which have none of their own: tables fit."""


def console() -> Console:
    """Where results are printed."""
    plain = Console()
    return plain if plain.is_terminal else Console(width=PIPED_COLUMNS)


def run_study(loaded: Study, folder: Path, *, command: str) -> None:
    """Run or take up a study; its tables on the terminal, its report beside the results."""
    from selfteach.analysis.critic_statistics import read_study_critics
    from selfteach.analysis.report.page import write_report
    from selfteach.analysis.terminal.tables import print_critics, print_results
    from selfteach.commands.progress import study_progress
    from selfteach.commands.study.run_study import jobs_of
    from selfteach.commands.study.run_study import run_study as run

    with study_progress(jobs_of(loaded, folder)) as progress:
        results = run(loaded, folder, command=command, progress=progress, sum_up=sum_up)
    shown = console()
    print_results(results, shown)
    print_critics(read_study_critics(folder), shown)
    shown.print(
        f"\nresults: {folder / 'results.json'}\nreport:  {write_report(folder)}", soft_wrap=True
    )


def sum_up(folder: Path, shown: Console | None = None) -> None:
    """An inspection's localisation.json and figures, and on a console its tables."""
    from selfteach.analysis.inspection.inspection_summary import (
        print_localisation,
        save_figures,
        summarize,
    )
    from selfteach.runtime.run_folder import write_json

    localisation = summarize(folder)
    write_json(folder / "localisation.json", localisation)
    save_figures(folder, localisation)
    if shown is not None:
        print_localisation(localisation, shown)
        shown.print(f"inspection: {folder}", soft_wrap=True)


def run_sweep(loaded: Study, folder: Path, *, command: str) -> dict[str, Any]:
    """Run or take up a sweep; the rates that it chose."""
    from selfteach.commands.progress import study_progress
    from selfteach.commands.study.run_study import run_sweep as run
    from selfteach.commands.study.run_study import sweep_jobs

    with study_progress(sweep_jobs(loaded, folder)) as progress:
        result = run(loaded, folder, command=command, progress=progress)
    for setting, arms in result["settings"].items():
        for arm, table in arms.items():
            means = "  ".join(f"{lr}: {mean:.1f}" for lr, mean in table["mean"].items())
            typer.echo(f"{setting}/{arm:14s} {means}   chosen {table['chosen']:g}")
    return result


def run_one(recipe: Recipe, folder: Path) -> None:
    """Run or take up one run, with its report."""
    from selfteach.commands.check.describe_recipe import notes
    from selfteach.commands.progress import run_progress
    from selfteach.trainer.loop import train as run

    for note in notes([recipe]) if torchrun.is_main() else ():
        typer.echo(note, err=True)
    with run_progress(recipe) as progress:
        for row in run(recipe, folder):
            progress(row)
    if not torchrun.is_main():
        return
    from selfteach.analysis.report.page import write_report

    model = f"\nmodel:  {folder / 'model'}" if recipe.train.steps else ""
    typer.echo(f"run:    {folder}{model}\nreport: {write_report(folder)}")


def run_selection(recipe: Recipe, chosen: SelectConfig, folder: Path) -> None:
    """Run or take up a selection; what went in and what came out."""
    from selfteach.commands.progress import selection_progress
    from selfteach.commands.select.selection import card_of
    from selfteach.commands.select.selection import select as run

    with selection_progress() as progress:
        for standing in run(recipe, chosen, folder):
            progress(standing)
    card = card_of(folder)
    out = ", ".join(f"{count:,} {name}" for name, count in card["out"].items())
    dropped = ", ".join(f"{count:,} {name}" for name, count in card["filters"].items())
    typer.echo(f"problems: {card['in']:,} in, {dropped}, {card['kept']:,} kept: {out}")
    typer.echo(f"card:     {folder / 'README.md'}")


def load(path: Path, settings: list[str] | None, arm: str | None = None) -> Study:
    """A recipe by path or shipped name; with one arm in view, plain settings are that arm's."""
    if arm is not None:
        tables = tuple(f"{table}." for table in TABLES)
        settings = [s if s.startswith(tables) else f"arms.{arm}.{s}" for s in settings or ()]
    shipped = {
        file.stem: file for file in (Path(__file__).parent.parent / "recipes").glob("*.toml")
    }
    if not path.exists():
        own = shipped.get(path.name.removesuffix(".toml")) if len(path.parts) == 1 else None
        if own is None:
            names = f", or one of {', '.join(sorted(shipped))}" if shipped else ""
            raise RecipeError(f"{path}: no such recipe; name a TOML file by its path{names}")
        path = own
    return load_study(path, settings or ())


def one_run(loaded: Study, arm: str | None, seed: int, *, first: bool = False) -> Recipe:
    """The recipe of one arm. Raises `RecipeError` where it is not clear which."""
    if arm is None:
        if len(loaded.arms) > 1 and not first:
            raise RecipeError(
                f"the recipe has several arms; name one: --arm {'|'.join(loaded.arms)}"
            )
        arm = next(iter(loaded.arms))
    return loaded.recipe(arm, seed=seed)


def run_with_critic(loaded: Study, arm: str | None, seed: int) -> Recipe:
    """An arm, or the first one that has a critic, or the first."""
    if arm is not None:
        return loaded.recipe(arm, seed=seed)
    arms = [loaded.recipe(name, seed=seed) for name in loaded.arms]
    return next((own for own in arms if own.critic is not None), arms[0])
