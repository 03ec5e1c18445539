"""The command line. Every wrong input is one line on stderr and exit status 2."""

from __future__ import annotations

import logging
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from selfteach import __version__
from selfteach.analysis.terminal.sanitize import sanitized
from selfteach.commands import actions
from selfteach.config.data_section import SelectConfig
from selfteach.config.recipe import Recipe
from selfteach.config.schema import validate
from selfteach.errors import CheckpointError, RecipeError, SelfteachError, Terminated
from selfteach.planning.plan_cli import plan
from selfteach.runtime import gc_pause, torchrun
from selfteach.runtime.signals import EXIT_STATUS

MANY_RANKS = ("train", "resume")
"""Commands that torchrun may start, several times over."""
PATIENCE_S = 5.0
"""How long another rank than 0 waits before it says what is wrong: rank 0 may be about to."""

app = typer.Typer(
    help="Train a language model on feedback about its own reasoning.\n\n"
    "Start with:  selfteach check RECIPE   (what it would do and cost; spends nothing)\n\n"
    "then:        selfteach study RECIPE --out DIR",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

RecipePath = Annotated[
    Path, typer.Argument(help="A TOML file; `name` finds one shipped with the package.")
]
Out = Annotated[Path, typer.Option("--out", "-o", help="A new or empty folder for the results.")]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Change one value of every arm, e.g. --set train.steps=20; repeatable. "
        "Keys that begin with study., arms., variants., sweep. or select. change those tables.",
    ),
]
Arm = Annotated[str | None, typer.Option(help="Which arm of the recipe; needed if it has several.")]
Seed = Annotated[int, typer.Option(help="Seed of the questions' order and of all sampling.")]


def _print_version(asked: bool) -> bool:
    if asked:
        typer.echo(f"selfteach {__version__}")
        raise typer.Exit
    return asked


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """What stands before a command."""


@app.command()
def study(recipe: RecipePath, out: Out, settings: Settings = None) -> None:
    """Compare arms: every arm, every seed, then one table with intervals and a report.

    Writes OUT/results.json and OUT/report.html. Stopped at any point, it goes on with
    `selfteach resume OUT`.
    """
    actions.run_study(actions.load(recipe, settings), out, command=_command())


@app.command()
def train(
    recipe: RecipePath, out: Out, arm: Arm = None, seed: Seed = 0, settings: Settings = None
) -> None:
    """One run: one arm, one seed. The trained model is OUT/model, in Hugging Face format."""
    actions.run_one(actions.one_run(actions.load(recipe, settings, arm), arm, seed), out)


@app.command()
def resume(
    folder: Annotated[Path, typer.Argument(help="The --out of a study, a run or a selection.")],
) -> None:
    """Go on with a study, a run or a selection, however it was stopped; what is on disk is kept."""
    if (folder / "study.json").exists():
        from selfteach.commands.study.run_study import load_existing

        existing, command, kind = load_existing(folder)
        run = actions.run_sweep if kind == "sweep" else actions.run_study
        run(existing, folder, command=command)
    else:
        from selfteach.runtime.run_folder import RunFolder

        if not folder.is_dir():
            raise CheckpointError(f"{folder}: no such folder")
        config = RunFolder(folder).config()
        if "select" in config:
            chosen = validate(SelectConfig, config["select"], where=str(folder))
            actions.run_selection(
                validate(Recipe, config["recipe"], where=str(folder)), chosen, folder
            )
        else:
            actions.run_one(validate(Recipe, config, where=str(folder)), folder)


@app.command()
def evaluate(
    what: Annotated[str, typer.Argument(help="A run folder, a checkpoint, or a model path or id.")],
    recipe: Annotated[
        Path | None,
        typer.Option(help="Where problems and sampling come from; by default the run's own."),
    ] = None,
    problems: Annotated[
        str,
        typer.Option(
            help="train, validation, test, or a .jsonl or .parquet file of questions and answers."
        ),
    ] = "validation",
    k: Annotated[int | None, typer.Option("-k", min=1, help="Answers per problem.")] = None,
    seed: Seed = 0,
    out: Annotated[Path | None, typer.Option(help="Write the evaluation here, as JSON.")] = None,
    settings: Settings = None,
) -> None:
    """Avg@k, Pass@k and Maj@k with 95 % intervals over problems."""
    from selfteach.commands.evaluate import evaluate_model

    chosen = (
        actions.one_run(actions.load(recipe, settings), None, seed, first=True) if recipe else None
    )
    result = evaluate_model(what, recipe=chosen, problems=problems, k=k, seed=seed)
    if out is not None:
        from selfteach.runtime.run_folder import write_json

        write_json(out, result)
    from selfteach.analysis.terminal.tables import print_evaluation

    print_evaluation(result, actions.console())


@app.command()
def inspect(
    what: Annotated[str, typer.Argument(help="A run folder, a checkpoint, or a model path or id.")],
    contexts: Annotated[
        str, typer.Option(help="What the self-teacher is shown: names with commas, or `all`.")
    ],
    out: Out,
    recipe: Annotated[
        Path | None,
        typer.Option(
            help="Where problems, critic and sampling come from; by default the run's own."
        ),
    ] = None,
    arm: Arm = None,
    problems: Annotated[
        str,
        typer.Option(help="train, validation, test, or a JSONL file with question and answer."),
    ] = "validation",
    answers: Annotated[int, typer.Option("--answers", "-k", min=1, help="Per problem.")] = 4,
    limit: Annotated[
        int | None, typer.Option(min=1, help="The first so many problems only.")
    ] = None,
    labelled: Annotated[
        Path | None,
        typer.Option(help="Take these answers, whose steps are labelled (ProcessBench's JSONL)."),
    ] = None,
    recorded: Annotated[
        str | None, typer.Option(help="Take a run's recorded answers, e.g. step_000010.")
    ] = None,
    teacher: Annotated[
        str, typer.Option(help="given: the model itself; initial: what its training began with.")
    ] = "given",
    seed: Seed = 0,
    settings: Settings = None,
) -> None:
    """Score the same answers under several contexts: what does each change, and where?

    Writes OUT/tokens.parquet (a row per token), OUT/answers.jsonl and OUT/localisation.json.
    """
    from selfteach.commands.inspect.inspection import Request, inspect_model
    from selfteach.commands.progress import answers_progress
    from selfteach.config.recipe import CONTEXTS

    if teacher not in ("given", "initial"):
        raise RecipeError(f"--teacher {teacher!r}: write given or initial")
    # The dial is asked for by name: only the lab has one.
    every = [name for name in CONTEXTS if name not in ("none", "partly_aligned")]
    names = every if contexts == "all" else [name.strip() for name in contexts.split(",")]
    request = Request(
        tuple(names),
        problems,
        answers,
        limit,
        seed,
        teacher,
        labelled,
        recorded,  # type: ignore[arg-type]
    )
    chosen = actions.run_with_critic(actions.load(recipe, None), arm, seed) if recipe else None
    with answers_progress() as progress:
        inspect_model(what, request, out, recipe=chosen, settings=settings or (), progress=progress)
    actions.sum_up(out, actions.console())


@app.command()
def check(
    recipe: RecipePath,
    offline: Annotated[
        bool,
        typer.Option(
            "--offline",
            help="Load no weights and ask no server; list what cannot be had here instead of failing.",
        ),
    ] = False,
    settings: Settings = None,
) -> None:
    """Validate a recipe and print what it resolves to, its sizes, memory and budget. Spends nothing."""
    from selfteach.commands.check.describe_recipe import describe_study

    loaded = actions.load(recipe, settings)
    # All of it first: a recipe that fails prints its one line of error and nothing else.
    lines = list(describe_study(loaded, offline=offline))
    if not offline:
        from selfteach.commands.study.run_study import critics_of, engines_of
        from selfteach.trainer.build_critic import require_critic
        from selfteach.trainer.build_engine import require_engine

        for critic in critics_of(loaded):
            require_critic(critic)
        for own in engines_of(loaded):
            require_engine(own)
    for line in lines:
        typer.echo(line)


app.command()(plan)


@app.command()
def report(
    folders: Annotated[
        list[Path],
        typer.Argument(metavar="DIR...", help="A study, a run, an inspection, or several."),
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="By default DIR/report.html; for several folders, report.html here."),
    ] = None,
) -> None:
    """One HTML file with results, answers, health and budget, also of what still goes on.

    Figures are written beside it, as SVG and PNG. An inspection in DIR/inspection is shown too.
    """
    from selfteach.analysis.report.page import write_report

    typer.echo(f"report: {write_report(*folders, out=out)}")


@app.command()
def watch(
    folder: Annotated[Path, typer.Argument(help="The --out of a study or of a run.")],
    once: Annotated[bool, typer.Option("--once", help="Print once and end.")] = False,
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between looks.")] = 2.0,
) -> None:
    """Look on while a study or a run goes on: step, time left, and the numbers that matter.

    Reads what the runs write and touches nothing; ends when all runs are complete.
    """
    from selfteach.analysis.terminal.watch import watch as look

    look(folder, actions.console(), once=once, every=every)


@app.command()
def critique(
    file: Annotated[
        Path,
        typer.Argument(
            help="JSON lines with question, text (the answer to be marked) and answer (the right "
            "one); or a run's rollouts/*.jsonl or samples/*.jsonl."
        ),
    ],
    recipe: Annotated[
        Path | None,
        typer.Option(help="Whose critic and problems; by default those of the run FILE lies in."),
    ] = None,
    arm: Arm = None,
    settings: Settings = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write the critiques here, as JSON lines.")
    ] = None,
    show: Annotated[int, typer.Option(min=0, help="Examples to show side by side.")] = 4,
) -> None:
    """Let a critic mark answers from a file, and show what it takes to judge its prompt."""
    from selfteach.analysis.terminal.critique_summary import print_critiques
    from selfteach.commands.critique import recipe_beside, recipe_of, review
    from selfteach.commands.progress import review_progress
    from selfteach.runtime.run_folder import write_lines
    from selfteach.trainer.build_critic import require_critic

    chosen = (
        recipe_of(actions.load(recipe, settings, arm), arm)
        if recipe
        else recipe_beside(file, settings)
    )
    require_critic(chosen.critic)
    with review_progress() as progress:
        rows, seconds = review(chosen, file, progress)
    print_critiques(rows, seconds, actions.console(), show=show)
    if out is not None:
        write_lines(out, rows)
        typer.echo(f"critiques: {out}")


@app.command()
def select(recipe: RecipePath, out: Out, arm: Arm = None, settings: Settings = None) -> None:
    """Choose a training set as the paper does, by the recipe's [select]: problems that are hard for
    the solver, answered in the right form, and solved by the critic; with splits and a data card."""
    loaded = actions.load(recipe, settings, arm)
    if arm is None:  # arms share solver and problems; the one with a critic knows all
        arms = {name: loaded.recipe(name, seed=0) for name in loaded.arms}
        arm = next((name for name, own in arms.items() if own.critic), next(iter(arms)))
    actions.run_selection(loaded.recipe(arm, seed=0), loaded.select, out)


@app.command()
def sweep(
    recipe: RecipePath,
    out: Out,
    record: Annotated[
        Path | None, typer.Option(help="Also write the table and the choices to this JSON file.")
    ] = None,
    settings: Settings = None,
) -> None:
    """The recipe's [sweep]: the same rates and seeds for every arm, judged on validation problems."""
    from selfteach.runtime.run_folder import write_json

    result = actions.run_sweep(actions.load(recipe, settings), out, command=_command())
    if record is not None:
        write_json(record, result)


def main() -> None:
    """The console script: one line for what a user can mend, a traceback for our own bugs."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    _quiet_libraries()
    gc_pause.pause()
    try:
        _require_one_process()
        app(sys.argv[1:] or ["--help"], standalone_mode=False)
    except typer.Exit as stop:
        sys.exit(stop.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        _fail("stopped; selfteach resume goes on from there", status=130)
    except Terminated:
        _end("terminated; what had been learned is saved, and selfteach resume goes on from there")
    except SelfteachError as error:
        if not torchrun.is_main():
            # What is wrong for all is said by rank 0, whose end ends this rank while it waits.
            time.sleep(PATIENCE_S)
            _fail(f"rank {torchrun.rank()}: {error}")
        _fail(str(error))
    except Exception as error:
        # Usage errors come from Typer's click, whose module moved between releases.
        told = getattr(error, "format_message", None)
        if told is None:
            raise
        _fail(told())


def _require_one_process() -> None:
    """Raises `RecipeError` under torchrun for a command that is not for many ranks."""
    command = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
    if torchrun.is_torchrun() and command not in MANY_RANKS:
        raise RecipeError(
            f"selfteach {command} is one process: call it without torchrun, which is for "
            + " and ".join(MANY_RANKS)
        )


def _command() -> str:
    return shlex.join(["selfteach", *sys.argv[1:]])


def _fail(message: str, *, status: int = 2) -> None:
    # A message may quote a server.
    sys.stderr.write("selfteach: " + " ".join(sanitized(message).split()) + "\n")
    sys.exit(status)


def _end(message: str) -> NoReturn:
    """At once, whatever other threads still wait for: all that counts is on disk."""
    sys.stderr.write(f"selfteach: {message}\n")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(EXIT_STATUS)


def _quiet_libraries() -> None:
    """Progress bars and advice of the libraries would stand between ours."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")
