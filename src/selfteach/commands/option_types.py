"""Define the options that several commands have in common."""

from __future__ import annotations

from typing import Annotated

import typer

Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override a value in every arm, e.g. --set train.steps=20; repeatable. "
        "Keys that start with study., arms., variants., sweep. or select. change those tables.",
    ),
]
Arm = Annotated[str | None, typer.Option(help="Arm of the recipe; required if it has several.")]
Seed = Annotated[int, typer.Option(help="Seed of the problem order and of sampling.")]
