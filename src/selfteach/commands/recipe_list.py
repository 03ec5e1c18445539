"""Lists the shipped recipes, or prints one of them: `selfteach recipes`."""

from __future__ import annotations

from typing import Annotated

import typer

from selfteach.config.shipped_recipes import find_recipe, shipped_recipes, summary_of


def recipes(
    name: Annotated[
        str | None, typer.Argument(help="Print this recipe: `selfteach recipes paper > mine.toml`.")
    ] = None,
) -> None:
    """List the recipes that are shipped with the package; every command takes them by name."""
    if name is not None:
        typer.echo(find_recipe(name).read_text(encoding="utf-8"), nl=False)
        return
    shipped = shipped_recipes()
    width = max(map(len, shipped))
    for each, file in shipped.items():
        typer.echo(f"{each:<{width}}  {summary_of(file)}")
