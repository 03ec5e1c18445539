"""Define `selfteach inspect`: the same rollouts under several contexts, token by token."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from selfteach.commands import actions
from selfteach.commands.option_types import Arm, Seed, Settings
from selfteach.errors import RecipeError
from selfteach.runtime.signals import keeping

Model = Annotated[str, typer.Argument(help="Run folder, checkpoint, or model path or hub id.")]
Contexts = Annotated[
    list[str],
    typer.Option(
        help="Contexts to show the teacher: names separated by commas, or `all`; repeatable."
    ),
]
Out = Annotated[Path, typer.Option("--out", "-o", help="New or empty output folder.")]
OtherRecipe = Annotated[
    Path | None,
    typer.Option(help="Recipe for problems, critic and sampling; default: that of the run."),
]
Problems = Annotated[
    str, typer.Option(help="train, validation, test, or a file with question and answer.")
]
Answers = Annotated[int, typer.Option("--answers", "-k", min=1, help="Rollouts per problem.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Use only the first N problems.")]
Labelled = Annotated[
    Path | None,
    typer.Option(help="Score completions with labelled steps (JSONL in ProcessBench's schema)."),
]
Recorded = Annotated[
    str | None, typer.Option(help="Score recorded rollouts of a run, e.g. step_000010.")
]
TeacherWeights = Annotated[
    str,
    typer.Option(help="Teacher weights: given (the model itself) or initial (before training)."),
]


def inspect(
    model: Model,
    contexts: Contexts,
    out: Out,
    recipe: OtherRecipe = None,
    arm: Arm = None,
    problems: Problems = "validation",
    k: Answers = 4,
    limit: Limit = None,
    labelled: Labelled = None,
    recorded: Recorded = None,
    teacher: TeacherWeights = "given",
    seed: Seed = 0,
    settings: Settings = None,
) -> None:
    """Score the same rollouts under several contexts, token by token.

    Writes OUT/tokens.parquet (a row per token), OUT/answers.jsonl and OUT/localisation.json.
    """
    actions.require_model(model)
    from selfteach.commands.inspect.context_names import context_names
    from selfteach.commands.inspect.inspection import InspectionRequest, inspect_model
    from selfteach.commands.progress import inspection_progress

    if teacher not in ("given", "initial"):
        raise RecipeError(f"--teacher {teacher!r}: must be given or initial")
    request = InspectionRequest(
        context_names(contexts), problems, k, limit, seed, teacher, labelled, recorded  # type: ignore[arg-type]
    )  # fmt: skip
    chosen = actions.run_with_critic(actions.load(recipe, None), arm, seed) if recipe else None
    with keeping(f"nothing is kept in {out}: repeat the command"), inspection_progress() as shown:
        inspect_model(model, request, out, recipe=chosen, settings=settings or (), progress=shown)
    actions.summarize_inspection(out, actions.console())
