"""Run the commands with progress bars and print their results."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import typer
from rich.console import Console

from selfteach.analysis.terminal.sanitize import sanitized
from selfteach.commands.study.jobs import Job
from selfteach.config.data_section import SelectConfig
from selfteach.config.recipe import Recipe
from selfteach.config.recipe_file import TABLES, Study, load_study
from selfteach.errors import RecipeError, RunStopped
from selfteach.models.model_path import require_folders, resolve
from selfteach.runtime import torchrun
from selfteach.runtime.folder_start import holds_work
from selfteach.runtime.signals import keeping

P = ParamSpec("P")
T = TypeVar("T")

PIPED_COLUMNS = 110
"""Width of output to a file or a pipe, in characters: wide enough for the tables."""


def console() -> Console:
    """Return the console that results are printed on."""
    terminal = Console()
    return terminal if terminal.is_terminal else Console(width=PIPED_COLUMNS)


def _says_what_is_kept(run: Callable[P, T]) -> Callable[P, T]:
    """Let a command that works in ``folder`` say what is there when a signal ends it, anywhere."""
    signature = inspect.signature(run)

    @functools.wraps(run)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        with keeping(lambda: progress_in(signature.bind(*args, **kwargs).arguments["folder"])):
            return run(*args, **kwargs)

    return wrapped


def progress_in(folder: Path) -> str:
    """Return what of a folder's work is on disk, and how to go on."""
    from selfteach.runtime.run_folder import RunFolder

    return RunFolder(folder).describe_progress()


@_says_what_is_kept
def run_study(loaded: Study, folder: Path, *, command: str) -> None:
    """Run or resume a study; print its tables and write its report."""
    from selfteach.analysis.critic_statistics import read_study_critics
    from selfteach.analysis.report.page import write_report
    from selfteach.analysis.terminal.tables import print_critics, print_results
    from selfteach.commands.progress import study_progress
    from selfteach.commands.study.run_study import jobs_of
    from selfteach.commands.study.run_study import run_study as run

    with study_progress(jobs_of(loaded, folder)) as progress:
        results = run(
            loaded, folder, command=command, progress=progress, summarize=summarize_inspection
        )
    output = console()
    print_results(results, output)
    print_critics(read_study_critics(folder), output)
    for line in _findings(jobs_of(loaded, folder)):
        typer.echo(f"health: {sanitized(line)}", err=True)
    output.print(
        f"\nresults: {folder / 'results.json'}\nreport:  {write_report(folder)}", soft_wrap=True
    )


def _findings(jobs: Sequence[Job]) -> Iterator[str]:
    """Yield what the runs of a study show about their health, a line each."""
    from selfteach.commands.findings import findings_of
    from selfteach.runtime.run_folder import RunFolder

    for job in jobs:
        findings = findings_of(job.recipe, job.folder, RunFolder(job.folder).metrics())
        if (why := findings.learned_nothing) is not None:
            yield f"{job.label} seed {job.seed} has learned nothing: {why}"
        for line in findings.lines:
            yield f"{job.label} seed {job.seed}: {line}"


def summarize_inspection(folder: Path, output: Console | None = None) -> None:
    """Write an inspection's localisation.json and figures; print its tables if there is a console."""
    from selfteach.analysis.inspection.inspection_summary import (
        print_localisation,
        save_figures,
        summarize,
    )
    from selfteach.runtime.atomic_files import write_json

    localisation = summarize(folder)
    write_json(folder / "localisation.json", localisation)
    save_figures(folder, localisation)
    if output is not None:
        print_localisation(localisation, output)
        output.print(f"inspection: {folder}", soft_wrap=True)


@_says_what_is_kept
def run_sweep(loaded: Study, folder: Path, *, command: str) -> dict[str, Any]:
    """Run or resume a sweep, print the learning rates it chose, and return its table."""
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


@_says_what_is_kept
def run_one(recipe: Recipe, folder: Path) -> None:
    """Run or resume one run, and write its report."""
    from selfteach.commands.check.describe_recipe import notes
    from selfteach.commands.findings import findings_of
    from selfteach.commands.progress import run_progress
    from selfteach.runtime.run_folder import RunFolder
    from selfteach.trainer.loop import train as run

    for note in notes([recipe]) if torchrun.is_main() else ():
        typer.echo(note, err=True)
    findings = findings_of(recipe, folder, RunFolder(folder).metrics())
    with run_progress(recipe, findings) as progress:
        for row in run(recipe, folder):
            progress(row)
    if not torchrun.is_main():
        return
    from selfteach.analysis.report.page import write_report

    model = f"\nmodel:  {folder / 'model'}" if recipe.train.steps else ""
    typer.echo(f"run:    {folder}{model}\nreport: {write_report(folder)}")
    for line in findings.lines:
        typer.echo(f"health: {sanitized(line)}", err=True)
    if (why := findings.learned_nothing) is not None:
        line = f"{folder} is complete and has learned nothing: {why}"
        if recipe.guard.idle_steps:
            raise RunStopped(line)
        typer.echo(f"health: {sanitized(line)}", err=True)


@_says_what_is_kept
def run_selection(recipe: Recipe, config: SelectConfig, folder: Path) -> None:
    """Run or resume a selection; print how many problems went in and came out."""
    from selfteach.commands.progress import selection_progress
    from selfteach.commands.select.selection import card_of
    from selfteach.commands.select.selection import select as run

    with selection_progress() as progress:
        for done in run(recipe, config, folder):
            progress(done)
    card = card_of(folder)
    out = ", ".join(f"{count:,} {name}" for name, count in card["out"].items())
    dropped = ", ".join(f"{count:,} {name}" for name, count in card["filters"].items())
    typer.echo(f"problems: {card['in']:,} in, {dropped}, {card['kept']:,} selected: {out}")
    typer.echo(f"card:     {folder / 'README.md'}")


def load(path_or_name: str | Path, settings: Sequence[str] | None, arm: str | None = None) -> Study:
    """Load a recipe by path or shipped name; with ``arm``, plain settings change that arm only."""
    if arm is not None:
        tables = tuple(f"{table}." for table in TABLES)
        settings = [s if s.startswith(tables) else f"arms.{arm}.{s}" for s in settings or ()]
    return load_study(path_or_name, settings or ())


def require_models(
    recipes: Iterable[Recipe], out: Path | None = None, *, packages: bool = True
) -> None:
    """Check that models named by folder are there, before torch is imported and ``out`` is written.

    A folder that holds work already is left to the command: it may not need the model any more.
    """
    if out is None or not out.is_dir() or not holds_work(out):
        require_folders(recipes, packages=packages)


def require_model(name: str) -> None:
    """Check that a model, run folder or checkpoint that a command names is there, if it is a folder."""
    resolve(name, "MODEL")


def one_run(loaded: Study, arm: str | None, seed: int, *, first: bool = False) -> Recipe:
    """Return the recipe of an arm; without ``arm``, of the only one (``first``: of the first).

    Raises `RecipeError` if the recipe has several arms and none is named.
    """
    if arm is None:
        if len(loaded.arms) > 1 and not first:
            raise RecipeError(
                f"the recipe has several arms; name one: --arm {'|'.join(loaded.arms)}"
            )
        arm = next(iter(loaded.arms))
    return loaded.recipe(arm, seed=seed)


def run_with_critic(loaded: Study, arm: str | None, seed: int) -> Recipe:
    """Return the recipe of an arm; without ``arm``, of the first that has a critic, or of the first."""
    if arm is not None:
        return loaded.recipe(arm, seed=seed)
    arms = [loaded.recipe(name, seed=seed) for name in loaded.arms]
    return next((recipe for recipe in arms if recipe.critic is not None), arms[0])


def accept_parts(folder: Path) -> None:
    """Accept the source that the user's own parts have now, in a folder and in those below it."""
    from selfteach.runtime.part_sources import accept_sources

    accept_sources(folder)
