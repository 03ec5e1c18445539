"""`selfteach plan`: its options, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from selfteach.commands import actions
from selfteach.planning.devices import HERE


def plan(
    recipe: Annotated[Path, typer.Argument(help="A TOML file, or the name of a shipped one.")],
    device: Annotated[
        str, typer.Option(help="A known device, as in devices.toml; `here` is this machine.")
    ] = HERE,
    trainers: Annotated[
        int | None, typer.Option(min=1, help="Devices that learn; by default one.")
    ] = None,
    samplers: Annotated[
        int, typer.Option(min=0, help="Devices that sample with vLLM; 0: trainers do it, in turns.")
    ] = 0,
    critics: Annotated[int, typer.Option(min=0, help="Devices that serve the critic.")] = 0,
    devices: Annotated[
        int | None, typer.Option(min=1, help="Share so many out in the best way, instead.")
    ] = None,
    calibrate: Annotated[
        list[str] | None,
        typer.Option(
            metavar="RUN|here",
            help="Measured steps in place of assumptions: a run's folder (repeatable; two sizes tell "
            "more), or `here`: a few steps on this machine, now.",
        ),
    ] = None,
    staleness: Annotated[
        int | None, typer.Option(min=0, help="Instead of the recipe's; 0 is sequential.")
    ] = None,
    answer_tokens: Annotated[
        float | None,
        typer.Option(min=1, help="Mean length of an answer; by default half the limit."),
    ] = None,
    critique_tokens: Annotated[
        float | None, typer.Option(min=1, help="The same of what the critic writes.")
    ] = None,
    critic_seconds: Annotated[
        float | None, typer.Option(min=0, help="What a reply takes from a critic elsewhere.")
    ] = None,
    explain: Annotated[bool, typer.Option("--explain", help="Show the arithmetic.")] = False,
    figure: Annotated[
        Path | None,
        typer.Option(help="Draw step time from 1 to 1,024 devices into this file (.svg and .png)."),
    ] = None,
    device_file: Annotated[
        Path | None, typer.Option(help="More devices, in the form of devices.toml.")
    ] = None,
    arm: Annotated[str | None, typer.Option(help="By default the first that has a critic.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="As everywhere.")
    ] = None,
) -> None:
    """Predict memory, step time and bottleneck on devices that are not here. Spends nothing, but with
    `--calibrate here`."""
    from selfteach.planning.plan import Request
    from selfteach.planning.plan import plan as lines_of
    from selfteach.planning.workload import Wishes

    chosen = actions.run_with_critic(actions.load(recipe, settings, arm), arm, 0)
    request = Request(
        device, device_file, trainers, samplers, critics, devices, tuple(calibrate or ()),
        Wishes(staleness, answer_tokens, critique_tokens, critic_seconds), explain, figure,
    )  # fmt: skip
    # All of it first: what fails prints its one line and nothing else.
    for line in list(lines_of(chosen, request)):
        typer.echo(line)
