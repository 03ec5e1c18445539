"""Defines `selfteach export-dataset`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def export_dataset(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="RUN|FILE",
            help="Run folder, or a file of critiques that selfteach critique --out has written.",
        ),
    ],
    form: Annotated[str, typer.Option("--format", help="trl, ms-swift or verl.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="New file: .parquet or .jsonl.")],
    recipe: Annotated[
        Path | None,
        typer.Option(help="Recipe of the critiques; default: that of the run with FILE."),
    ] = None,
    arm: Annotated[
        str | None, typer.Option(help="Arm of the recipe; default: the first with a critic.")
    ] = None,
    context: Annotated[
        str | None,
        typer.Option(help="Render this context from the critiques, in place of the recipe's."),
    ] = None,
    with_all: Annotated[
        bool, typer.Option("--all", help="Also write rollouts without a teacher context.")
    ] = False,
    data_source: Annotated[
        str, typer.Option(help="verl's data_source, which selects a reward function.")
    ] = "selfteach",
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a value of the recipe."),
    ] = None,
) -> None:
    """Write problems with verdicts, critiques and teacher contexts as another trainer's data set."""
    from selfteach.commands.export.export_dataset import DatasetRequest, export
    from selfteach.commands.export.trainer_formats import describe_left_out

    request = DatasetRequest(
        source, form, out, recipe, arm, context, with_all, data_source, tuple(settings or ())
    )
    counts = export(request)
    typer.echo(
        f"data set: {counts.rows:,} rows of {len(counts.problems):,} problems in {out} ({form})"
    )
    if counts.without_context:
        what = "without a teacher context" if with_all else "left out (--all writes them)"
        typer.echo(f"{what}: {describe_left_out(counts)}")
    if counts.other_examples:
        typer.echo(
            f"note: in {counts.other_examples:,} rows the teacher has other worked examples or another "
            "system prompt than the student; ms-swift replaces the last user message alone, so its "
            "teacher sees the student's"
        )
