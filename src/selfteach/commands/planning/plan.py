"""Make the plan of a request: forecast one layout, search for the best one, or plot the scaling."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from selfteach.commands.check.sizes import measure_offline
from selfteach.commands.planning.accuracy import error_lines
from selfteach.commands.planning.calibration import (
    calibrate,
    measure_here,
    read_run,
    with_lengths_of,
)
from selfteach.commands.planning.costs import Efficiency
from selfteach.commands.planning.describe_plan import describe
from selfteach.commands.planning.devices import HERE, find_device
from selfteach.commands.planning.estimate import (
    Forecast,
    Hardware,
    best_forecast,
    forecast,
    load_simulate,
    with_full_concurrency,
)
from selfteach.commands.planning.layout import Layout, critic_groups, sampler_groups
from selfteach.commands.planning.workload import Overrides, StepWork, work_of
from selfteach.config.recipe import Recipe
from selfteach.errors import RecipeError


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """Describes what to plan: devices by role, or a total to split."""

    device: str = HERE
    device_file: Path | None = None
    trainers: int | None = None
    samplers: int = 0
    critics: int = 0
    total: int | None = None
    calibrate: tuple[str, ...] = ()
    """Run folders, or ``here`` for a few steps on this machine."""
    overrides: Overrides = field(default_factory=Overrides)
    explain: bool = False
    figure: Path | None = None


def plan(recipe: Recipe, request: PlanRequest) -> Iterator[str]:
    """Yield the lines of a plan; with ``figure`` plot the scaling instead, and yield its table.

    Raises `RecipeError` for devices that are unknown or too few, and without SimPy.
    """
    if request.total is not None and (request.trainers or request.samplers or request.critics):
        raise RecipeError(
            "--devices splits all devices by role: drop --trainers, --samplers and --critics"
        )
    load_simulate()  # a missing SimPy is reported before a calibration spends minutes
    work, hardware = prepare(recipe, request)
    if request.figure is not None:
        from selfteach.commands.planning.figure import reasons, rows, scaling, write

        work = _for_many_devices(work)
        lines = scaling(work, hardware)
        title = f"{recipe.model.path}, {work.rollouts:,} rollouts per step, on {hardware.name}"
        yield from rows(lines)
        yield from reasons(lines)
        yield f"figure: {', '.join(map(str, write(lines, title, request.figure)))}"
        yield from error_lines(hardware.name, hardware.efficiency.measured)
        return
    yield from describe(forecast_of(work, hardware, request), explain=request.explain)


def prepare(recipe: Recipe, request: PlanRequest) -> tuple[StepWork, Hardware]:
    """Return a step's work and the hardware; a calibration replaces assumptions by measured values."""
    work = work_of(recipe, measure_offline(recipe), request.overrides)
    device, efficiency = find_device(request.device, request.device_file), Efficiency()
    if request.calibrate:
        runs = [
            run
            for name in request.calibrate
            for run in (measure_here(recipe) if name == HERE else [read_run(Path(name))])
        ]
        efficiency = calibrate(runs, device)
        overrides, measured = request.overrides, with_lengths_of(runs, work)
        lengths = work if overrides.rollout_tokens else measured
        critic = work if overrides.critique_tokens else measured
        work = dataclasses.replace(
            measured, rollout_lengths=lengths.rollout_lengths, critic=critic.critic
        )
    return work, Hardware(request.device, device, efficiency)


def forecast_of(work: StepWork, hardware: Hardware, request: PlanRequest) -> Forecast:
    """Return the forecast of the requested layout, or of the best one for a total."""
    if request.total is not None:
        work = _for_many_devices(work) if request.total > 1 else work
        return best_forecast(work, hardware, request.total)
    groups = sampler_groups(work, hardware.device), critic_groups(work, hardware.device)
    trainers = request.trainers or 1
    counts = (request.samplers or trainers, request.critics or trainers)
    layout = Layout(trainers, request.samplers, request.critics, *map(_group, groups, counts))
    return forecast(work, hardware, layout)


def _group(sizes: Sequence[int], devices: int) -> int:
    """Return the smallest group that holds the model, for as many replicas as possible."""
    fitting = [size for size in sizes if size <= devices]
    return fitting[0] if fitting else 1


def _for_many_devices(work: StepWork) -> StepWork:
    """Return the work as set up for many devices: vLLM samples, all critic requests in flight."""
    return with_full_concurrency(dataclasses.replace(work, engine="vllm"))
