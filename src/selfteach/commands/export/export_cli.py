"""Defines `selfteach export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def export(
    run: Annotated[Path, typer.Argument(help="Folder of a complete run.")],
    to: Annotated[Path, typer.Option("--to", help="New or empty folder for the model.")],
    merge: Annotated[
        bool, typer.Option("--merge", help="Add the adapters to the base's weights.")
    ] = False,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; default: as trained.")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(help="Hub id of the base model, where the run loaded it from elsewhere."),
    ] = None,
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="ID", help="Also upload the folder to this hub id.")
    ] = None,
) -> None:
    """Export a run's model with a model card: a PEFT adapter, merged weights, or the full model."""
    from selfteach.commands.export.export_run import ExportRequest, export_run

    folder = export_run(ExportRequest(run, to, merge, dtype, base, push_to_hub))
    typer.echo(f"model: {folder}\ncard:  {folder / 'README.md'}")
