"""The command line. Every wrong input is one line on stderr and exit status 2."""

from __future__ import annotations

import logging
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from selfteach.analysis.plain_text import plain
from selfteach.config import Recipe
from selfteach.config_data import SelectConfig
from selfteach.errors import CheckpointError, RecipeError, SelfteachError
from selfteach.recipes import TABLES, Study, load_study
from selfteach.settings import validate

app = typer.Typer(
    help="Train a language model on feedback about its own reasoning.\n\n"
    "Start with:  selfteach check RECIPE   (what it would do and cost; spends nothing)\n\n"
    "then:        selfteach study RECIPE --out DIR",
    no_args_is_help=True,
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


@app.command()
def study(recipe: RecipePath, out: Out, settings: Settings = None) -> None:
    """Compare arms: every arm, every seed, then one table with intervals and a report.

    Writes OUT/results.json and OUT/report.html. Stopped at any point, it goes on with
    `selfteach resume OUT`.
    """
    _run_study(_load(recipe, settings), out, command=_command())


@app.command()
def train(
    recipe: RecipePath, out: Out, arm: Arm = None, seed: Seed = 0, settings: Settings = None
) -> None:
    """One run: one arm, one seed. The trained model is OUT/model, in Hugging Face format."""
    _train(_one(_load(recipe, settings, arm), arm, seed), out)


@app.command()
def resume(
    folder: Annotated[Path, typer.Argument(help="The --out of a study, a run or a selection.")],
) -> None:
    """Go on with a study, a run or a selection, however it was stopped; what is on disk is kept."""
    if (folder / "study.json").exists():
        from selfteach.study import load_existing

        existing, command, kind = load_existing(folder)
        run = _run_sweep if kind == "sweep" else _run_study
        run(existing, folder, command=command)
    else:
        from selfteach.run_folder import RunFolder

        if not folder.is_dir():
            raise CheckpointError(f"{folder}: no such folder")
        config = RunFolder(folder).config()
        if "select" in config:
            chosen = validate(SelectConfig, config["select"], where=str(folder))
            _select(validate(Recipe, config["recipe"], where=str(folder)), chosen, folder)
        else:
            _train(validate(Recipe, config, where=str(folder)), folder)


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
    from selfteach.api import evaluate_model

    chosen = _one(_load(recipe, settings), None, seed, first=True) if recipe else None
    result = evaluate_model(what, recipe=chosen, problems=problems, k=k, seed=seed)
    if out is not None:
        from selfteach.run_folder import write_json

        write_json(out, result)
    from selfteach.analysis.console import print_evaluation

    print_evaluation(result, Console())


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
    from selfteach.api import inspect_model
    from selfteach.config import CONTEXTS
    from selfteach.inspection.request import Request
    from selfteach.progress import answers_progress

    if teacher not in ("given", "initial"):
        raise RecipeError(f"--teacher {teacher!r}: write given or initial")
    every = [name for name in CONTEXTS if name != "none"]
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
    chosen = _with_critic(_load(recipe, None), arm, seed) if recipe else None
    with answers_progress() as progress:
        inspect_model(what, request, out, recipe=chosen, settings=settings or (), progress=progress)
    _sum_up(out, Console())


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
    from selfteach.plan import describe_study

    loaded = _load(recipe, settings)
    # All of it first: a recipe that fails prints its one line of error and nothing else.
    lines = list(describe_study(loaded, offline=offline))
    if not offline:
        from selfteach.build_critic import require_critic
        from selfteach.study import critics_of

        for critic in critics_of(loaded):
            require_critic(critic)
    for line in lines:
        typer.echo(line)


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
    from selfteach.analysis.report import write_report

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
    from selfteach.analysis.watch import watch as look

    look(folder, Console(), once=once, every=every)


@app.command()
def critique(
    file: Annotated[
        Path,
        typer.Argument(
            help="JSON lines with question, text (the answer to be marked) and answer (the right "
            "one); or a run's answers/*.jsonl or lessons/*.jsonl."
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
    from selfteach.analysis.review import print_review
    from selfteach.build_critic import require_critic
    from selfteach.progress import review_progress
    from selfteach.review import recipe_beside, recipe_of, review
    from selfteach.run_folder import write_lines

    chosen = (
        recipe_of(_load(recipe, settings, arm), arm) if recipe else recipe_beside(file, settings)
    )
    require_critic(chosen.critic)
    with review_progress() as progress:
        rows, seconds = review(chosen, file, progress)
    print_review(rows, seconds, Console(), show=show)
    if out is not None:
        write_lines(out, rows)
        typer.echo(f"critiques: {out}")


@app.command()
def select(recipe: RecipePath, out: Out, arm: Arm = None, settings: Settings = None) -> None:
    """Choose a training set as the paper does, by the recipe's [select]: problems that are hard for
    the solver, answered in the right form, and solved by the critic; with splits and a data card."""
    loaded = _load(recipe, settings, arm)
    if arm is None:  # arms share solver and problems; the one with a critic knows all
        arms = {name: loaded.recipe(name, seed=0) for name in loaded.arms}
        arm = next((name for name, own in arms.items() if own.critic), next(iter(arms)))
    _select(loaded.recipe(arm, seed=0), loaded.select, out)


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
    from selfteach.run_folder import write_json

    result = _run_sweep(_load(recipe, settings), out, command=_command())
    if record is not None:
        write_json(record, result)


def main() -> None:
    """The console script: one line for what a user can mend, a traceback for our own bugs."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    _quiet_libraries()
    try:
        app(standalone_mode=False)
    except typer.Exit as stop:
        sys.exit(stop.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        _fail("stopped; selfteach resume goes on from there", status=130)
    except SelfteachError as error:
        _fail(str(error))
    except Exception as error:
        # Usage errors come from Typer's click, whose module moved between releases.
        told = getattr(error, "format_message", None)
        if told is None:
            raise
        _fail(told())


def _run_study(loaded: Study, folder: Path, *, command: str) -> None:
    from selfteach.analysis.console import print_critics, print_results
    from selfteach.analysis.critics import read_study
    from selfteach.analysis.report import write_report
    from selfteach.progress import study_progress
    from selfteach.study import jobs_of, run_study

    with study_progress(jobs_of(loaded, folder)) as progress:
        results = run_study(loaded, folder, command=command, progress=progress)
    inspected = folder / "inspection"
    if (inspected / "inspection.json").exists() and not (inspected / "localisation.json").exists():
        _sum_up(inspected, None)
    console = Console()
    print_results(results, console)
    print_critics(read_study(folder), console)
    console.print(
        f"\nresults: {folder / 'results.json'}\nreport:  {write_report(folder)}", soft_wrap=True
    )


def _sum_up(folder: Path, console: Console | None) -> None:
    """An inspection's localisation.json and figures, and on a console its tables."""
    from selfteach.analysis.inspection import draw, print_localisation, summarise
    from selfteach.run_folder import write_json

    localisation = summarise(folder)
    write_json(folder / "localisation.json", localisation)
    draw(folder, localisation)
    if console is not None:
        print_localisation(localisation, console)
        console.print(f"inspection: {folder}", soft_wrap=True)


def _run_sweep(loaded: Study, folder: Path, *, command: str) -> dict[str, Any]:
    from selfteach.progress import study_progress
    from selfteach.study import run_sweep, sweep_jobs

    with study_progress(sweep_jobs(loaded, folder)) as progress:
        result = run_sweep(loaded, folder, command=command, progress=progress)
    for setting, arms in result["settings"].items():
        for arm, table in arms.items():
            means = "  ".join(f"{lr}: {mean:.1f}" for lr, mean in table["mean"].items())
            typer.echo(f"{setting}/{arm:14s} {means}   chosen {table['chosen']:g}")
    return result


def _train(recipe: Recipe, folder: Path) -> None:
    from selfteach.progress import run_progress
    from selfteach.train import train as run

    with run_progress(recipe) as progress:
        for row in run(recipe, folder):
            progress(row)
    from selfteach.analysis.report import write_report

    model = f"\nmodel:  {folder / 'model'}" if recipe.train.steps else ""
    typer.echo(f"run:    {folder}{model}\nreport: {write_report(folder)}")


def _select(recipe: Recipe, chosen: SelectConfig, folder: Path) -> None:
    from selfteach.progress import selection_progress
    from selfteach.selection import card_of
    from selfteach.selection import select as run

    with selection_progress() as progress:
        for standing in run(recipe, chosen, folder):
            progress(standing)
    card = card_of(folder)
    out = ", ".join(f"{count:,} {name}" for name, count in card["out"].items())
    dropped = ", ".join(f"{count:,} {name}" for name, count in card["filters"].items())
    typer.echo(f"problems: {card['in']:,} in, {dropped}, {card['kept']:,} kept: {out}")
    typer.echo(f"card:     {folder / 'README.md'}")


def _load(path: Path, settings: list[str] | None, arm: str | None = None) -> Study:
    """A recipe by path or shipped name; with one arm in view, plain settings are that arm's."""
    if arm is not None:
        tables = tuple(f"{table}." for table in TABLES)
        settings = [s if s.startswith(tables) else f"arms.{arm}.{s}" for s in settings or ()]
    shipped = Path(__file__).parent / "recipes" / f"{path.name.removesuffix('.toml')}.toml"
    if not path.exists() and len(path.parts) == 1 and shipped.exists():
        path = shipped
    return load_study(path, settings or ())


def _one(loaded: Study, arm: str | None, seed: int, *, first: bool = False) -> Recipe:
    if arm is None:
        if len(loaded.arms) > 1 and not first:
            raise RecipeError(
                f"the recipe has several arms; name one: --arm {'|'.join(loaded.arms)}"
            )
        arm = next(iter(loaded.arms))
    return loaded.recipe(arm, seed=seed)


def _with_critic(loaded: Study, arm: str | None, seed: int) -> Recipe:
    """An arm, or the first one that has a critic, or the first."""
    if arm is not None:
        return loaded.recipe(arm, seed=seed)
    arms = [loaded.recipe(name, seed=seed) for name in loaded.arms]
    return next((own for own in arms if own.critic is not None), arms[0])


def _command() -> str:
    return shlex.join(["selfteach", *sys.argv[1:]])


def _fail(message: str, *, status: int = 2) -> None:
    # A message may quote a server.
    sys.stderr.write("selfteach: " + " ".join(plain(message).split()) + "\n")
    sys.exit(status)


def _quiet_libraries() -> None:
    """Progress bars and advice of the libraries would stand between ours."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")
