"""Define the options of `selfteach plan`; the planner is imported when the command runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from selfteach.commands import actions
from selfteach.commands.planning.devices import HERE

Recipe = Annotated[Path, typer.Argument(help="A TOML file, or the name of a shipped one.")]
Device = Annotated[
    str, typer.Option(help="A device of devices.toml; `here` measures this machine.")
]
Trainers = Annotated[int | None, typer.Option(min=1, help="Devices that train; default 1.")]
Samplers = Annotated[
    int, typer.Option(min=0, help="Devices that sample with vLLM; 0: trainers also sample.")
]
Critics = Annotated[int, typer.Option(min=0, help="Devices that serve the critic.")]
Devices = Annotated[
    int | None, typer.Option(min=1, help="Find the fastest split of at most this many devices.")
]
Calibrate = Annotated[
    list[str] | None,
    typer.Option(
        metavar="RUN|here",
        help="Fit efficiencies to measured steps: a run folder (repeatable; two sizes are better), "
        "or `here`: run a few steps on this machine now.",
    ),
]
Staleness = Annotated[
    int | None, typer.Option(min=0, help="Replaces train.staleness; 0 is synchronous.")
]
AnswerTokens = Annotated[
    float | None, typer.Option(min=1, help="Mean length of a rollout; default half the limit.")
]
CritiqueTokens = Annotated[
    float | None, typer.Option(min=1, help="Mean length of a critique; default half the limit.")
]
CriticSeconds = Annotated[
    float | None, typer.Option(min=0, help="Seconds per reply of a critic whose size is unknown.")
]
MixedGroups = Annotated[
    float | None,
    typer.Option(
        min=0,
        max=1,
        help="Share of groups with right and wrong rollouts, for dynamic sampling; default half.",
    ),
]
Explain = Annotated[bool, typer.Option("--explain", help="Show the arithmetic.")]
Figure = Annotated[
    Path | None,
    typer.Option(help="Plot step time on 1 to 1,024 devices to this file (.svg and .png)."),
]
DeviceFile = Annotated[Path | None, typer.Option(help="More devices, in the form of devices.toml.")]
Arm = Annotated[str | None, typer.Option(help="Default: the first arm that has a critic.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a recipe key; repeatable."),
]


def plan(
    recipe: Recipe,
    device: Device = HERE,
    trainers: Trainers = None,
    samplers: Samplers = 0,
    critics: Critics = 0,
    devices: Devices = None,
    calibrate: Calibrate = None,
    staleness: Staleness = None,
    answer_tokens: AnswerTokens = None,
    critique_tokens: CritiqueTokens = None,
    critic_seconds: CriticSeconds = None,
    mixed_groups: MixedGroups = None,
    explain: Explain = False,
    figure: Figure = None,
    device_file: DeviceFile = None,
    arm: Arm = None,
    settings: Settings = None,
) -> None:
    """Predict memory, step time and bottleneck on devices that are not here. Loads no weights, sends no
    request, except with `--calibrate here`."""
    from selfteach.commands.planning.plan import PlanRequest
    from selfteach.commands.planning.plan import plan as plan_lines
    from selfteach.commands.planning.workload import Overrides

    chosen = actions.run_with_critic(actions.load(recipe, settings, arm), arm, 0)
    request = PlanRequest(
        device, device_file, trainers, samplers, critics, devices, tuple(calibrate or ()),
        Overrides(staleness, answer_tokens, critique_tokens, critic_seconds, mixed_groups),
        explain, figure,
    )  # fmt: skip
    # Complete the plan before printing: an error prints its one line and nothing else.
    for line in list(plan_lines(chosen, request)):
        typer.echo(line)
