"""Define the command line. Invalid input prints one line to stderr and exits with status 2."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from selfteach import __version__
from selfteach.commands import actions
from selfteach.commands.cache_cli import cache_app
from selfteach.commands.console_script import run_console_script
from selfteach.commands.export.dataset_cli import export_dataset
from selfteach.commands.export.export_cli import export
from selfteach.commands.forecast.forecast_cli import forecast
from selfteach.commands.init.init_cli import init
from selfteach.commands.inspect.inspect_cli import inspect
from selfteach.commands.option_types import Arm, Seed, Settings
from selfteach.commands.planning.plan_cli import plan
from selfteach.commands.recipe_list import recipes
from selfteach.commands.resume import resume_folder
from selfteach.commands.study.run_study import recipes_of
from selfteach.runtime.signals import keeping

app = typer.Typer(
    help="Train a language model on feedback about its own reasoning.\n\n"
    "Start with:  selfteach init --model MODEL --data FILE   (or choose one: selfteach recipes)\n\n"
    "then:        selfteach check RECIPE   (prints sizes, memory and cost; runs nothing)\n\n"
    "then:        selfteach study RECIPE --out DIR",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

RecipePath = Annotated[
    Path, typer.Argument(help="TOML file, or the name of a shipped recipe (selfteach recipes).")
]
Out = Annotated[
    Path, typer.Option("--out", "-o", help="Output folder; resumes if it holds the same run.")
]
AcceptParts = Annotated[
    bool, typer.Option("--accept-parts", help="Go on with the present source of your own parts.")
]


def _print_version(requested: bool) -> bool:
    if requested:
        typer.echo(f"selfteach {__version__}")
        raise typer.Exit
    return requested


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Accept the options that precede a command."""


@app.command()
def study(recipe: RecipePath, out: Out, settings: Settings = None) -> None:
    """Run every arm with every seed, then compare them in a table with intervals and a report.

    Writes OUT/results.json and OUT/report.html. After an interruption, continue with
    `selfteach resume OUT`.
    """
    loaded = actions.load(recipe, settings)
    actions.require_models(recipes_of(loaded), out)
    actions.run_study(loaded, out, command=_command())


@app.command()
def train(
    recipe: RecipePath, out: Out, arm: Arm = None, seed: Seed = 0, settings: Settings = None
) -> None:
    """Train one arm with one seed. Saves the model to OUT/model in Hugging Face format."""
    chosen = actions.one_run(actions.load(recipe, settings, arm), arm, seed)
    actions.require_models([chosen], out)
    actions.run_one(chosen, out)


@app.command()
def resume(
    folder: Annotated[
        Path, typer.Argument(help="Folder of a study, a sweep, a run or a selection.")
    ],
    accept_parts: AcceptParts = False,
) -> None:
    """Resume a study, sweep, run or selection from what is on disk."""
    resume_folder(folder, accept_parts=accept_parts)


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="Run folder, checkpoint, or model path or hub id.")],
    recipe: Annotated[
        Path | None,
        typer.Option(help="Recipe for problems and sampling; default: that of the run."),
    ] = None,
    problems: Annotated[
        str,
        typer.Option(help="train, validation, test, or a file with question and answer."),
    ] = "validation",
    k: Annotated[int | None, typer.Option("-k", min=1, help="Rollouts per problem.")] = None,
    seed: Seed = 0,
    out: Annotated[
        Path | None, typer.Option(help="Also write the evaluation to this JSON file.")
    ] = None,
    settings: Settings = None,
) -> None:
    """Evaluate a model: Avg@k, Pass@k and Maj@k with 95 % intervals over problems."""
    actions.require_model(model)
    from selfteach.commands.evaluate import evaluate_model

    chosen = (
        actions.one_run(actions.load(recipe, settings), None, seed, first=True) if recipe else None
    )
    result = evaluate_model(model, recipe=chosen, problems=problems, k=k, seed=seed)
    if out is not None:
        from selfteach.runtime.atomic_files import write_json

        write_json(out, result)
    from selfteach.analysis.terminal.tables import print_evaluation

    print_evaluation(result, actions.console())


app.command()(inspect)


@app.command()
def check(
    recipe: RecipePath,
    offline: Annotated[
        bool,
        typer.Option(
            "--offline",
            help="Load no weights, contact no server; list what is not available instead of failing.",
        ),
    ] = False,
    show_prompts: Annotated[
        bool,
        typer.Option(
            "--show-prompts", help="Print what student, teacher and critic of each arm are shown."
        ),
    ] = False,
    settings: Settings = None,
) -> None:
    """Validate a recipe; print resolved values, sizes, memory and budget. Runs nothing."""
    loaded = actions.load(recipe, settings)
    actions.require_models(recipes_of(loaded), packages=not offline)
    from selfteach.commands.check.describe_recipe import describe_study

    # Collected before printing: a recipe that fails prints its error line and nothing else.
    lines = list(describe_study(loaded, offline=offline))
    if show_prompts:
        from selfteach.commands.check.shown_prompts import shown_prompts

        seed = loaded.study.seeds[0]
        lines += shown_prompts({arm: loaded.recipe(arm, seed=seed) for arm in loaded.arms})
    if not offline:
        from selfteach.trainer.preflight import preflight

        lines += preflight(recipes_of(loaded))
    for line in lines:
        typer.echo(line)


app.command()(init)
app.command()(recipes)
app.command()(plan)
app.command()(forecast)
app.command()(export)
app.command()(export_dataset)
app.add_typer(cache_app, name="cache")


@app.command()
def report(
    folders: Annotated[
        list[Path],
        typer.Argument(metavar="DIR...", help="Folders of studies, runs or inspections."),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            help="Output file; default: DIR/report.html, or ./report.html for several folders."
        ),
    ] = None,
) -> None:
    """Write an HTML report: results, rollouts, health and budget; works while runs are in progress.

    Also writes the figures as SVG and PNG. Includes an inspection in DIR/inspection.
    """
    from selfteach.analysis.report.page import write_report

    typer.echo(f"report: {write_report(*folders, out=out)}")


@app.command()
def watch(
    folder: Annotated[Path, typer.Argument(help="Folder of a study or a run.")],
    once: Annotated[bool, typer.Option("--once", help="Print once and exit.")] = False,
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between updates.")] = 2.0,
) -> None:
    """Show the progress of a study or a run: step, time left and the main metrics.

    Only reads the run folders; exits when all runs are complete.
    """
    from selfteach.analysis.terminal.watch import watch as watch_folder

    with keeping("the runs themselves go on"):
        watch_folder(folder, actions.console(), once=once, every=every)


@app.command()
def critique(
    file: Annotated[
        Path,
        typer.Argument(
            help="JSON lines with question, text (the completion to critique) and answer (the correct "
            "final answer); or a run's rollouts/*.jsonl or samples/*.jsonl."
        ),
    ],
    recipe: Annotated[
        Path | None,
        typer.Option(help="Recipe for critic and problems; default: that of the run with FILE."),
    ] = None,
    arm: Arm = None,
    settings: Settings = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Also write the critiques to this JSONL file."),
    ] = None,
    show: Annotated[int, typer.Option(min=0, help="Number of examples to print.")] = 4,
) -> None:
    """Critique completions from a file and print statistics and examples, to tune a critic's prompt."""
    from selfteach.analysis.terminal.critique_summary import print_critiques
    from selfteach.commands.critique import critique_file, recipe_beside, recipe_of
    from selfteach.commands.progress import critique_progress
    from selfteach.runtime.atomic_files import write_lines
    from selfteach.trainer.preflight import preflight

    chosen = (
        recipe_of(actions.load(recipe, settings, arm), arm)
        if recipe
        else recipe_beside(file, settings)
    )
    preflight([chosen], critic_only=True)
    with critique_progress() as progress:
        rows, seconds = critique_file(chosen, file, progress)
    print_critiques(rows, seconds, actions.console(), show=show)
    if out is not None:
        write_lines(out, rows)
        typer.echo(f"critiques: {out}")


@app.command()
def select(recipe: RecipePath, out: Out, arm: Arm = None, settings: Settings = None) -> None:
    """Select a training set by the recipe's [select]: hard for the policy, well formatted, solved by
    the critic. Writes splits and a data card."""
    loaded = actions.load(recipe, settings, arm)
    # Arms share policy and problems, so any arm with a critic will do.
    chosen = actions.run_with_critic(loaded, arm, seed=0)
    actions.require_models([chosen], out)
    actions.run_selection(chosen, loaded.select, out)


@app.command()
def sweep(
    recipe: RecipePath,
    out: Out,
    record: Annotated[
        Path | None,
        typer.Option(help="Also write the table and the chosen rates to this JSON file."),
    ] = None,
    settings: Settings = None,
) -> None:
    """Run the recipe's [sweep]: choose each arm's learning rate by validation Avg@k."""
    from selfteach.runtime.atomic_files import write_json

    loaded = actions.load(recipe, settings)
    actions.require_models(recipes_of(loaded), out)
    result = actions.run_sweep(loaded, out, command=_command())
    if record is not None:
        write_json(record, result)


def main() -> None:
    """Run the console script: one line for a user's error, a traceback for a bug."""
    run_console_script(app)


def _command() -> str:
    return shlex.join(["selfteach", *sys.argv[1:]])
