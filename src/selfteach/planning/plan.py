"""What the command asks for, and the plan that answers it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from selfteach.commands.check.sizes import measure_offline
from selfteach.config.recipe import Recipe
from selfteach.errors import RecipeError
from selfteach.planning.calibration import calibrate, lengths_of, measure_here, read_run
from selfteach.planning.costs import Efficiency
from selfteach.planning.describe_plan import describe
from selfteach.planning.devices import HERE, find_device
from selfteach.planning.estimate import Forecast, Where, best, forecast, with_concurrency
from selfteach.planning.layout import Layout, critic_groups, sampler_groups
from selfteach.planning.workload import Wishes, Work, work_of


@dataclass(frozen=True, slots=True)
class Request:
    """A plan's question: devices by role, or how many there are to share out."""

    device: str = HERE
    device_file: Path | None = None
    trainers: int | None = None
    samplers: int = 0
    critics: int = 0
    total: int | None = None
    calibrate: tuple[str, ...] = ()
    """Run folders, or ``here`` for a few steps on this machine."""
    wishes: Wishes = field(default_factory=Wishes)
    explain: bool = False
    figure: Path | None = None


def plan(recipe: Recipe, request: Request) -> Iterator[str]:
    """The plan in lines; with ``figure`` the scaling instead, drawn and as a table.

    Raises `RecipeError` for devices that are unknown or too few.
    """
    if request.total is not None and (request.trainers or request.samplers or request.critics):
        raise RecipeError("--devices shares all devices out: leave --trainers and the others away")
    work, where = prepare(recipe, request)
    if request.figure is not None:
        from selfteach.planning.figure import reasons, rows, scaling, write

        work = _many(work)
        lines = scaling(work, where)
        title = f"{recipe.model.path}, {work.answers:,} answers a step, on {where.name}"
        yield from rows(lines)
        yield from reasons(lines)
        yield f"figure: {', '.join(map(str, write(lines, title, request.figure)))}"
        return
    yield from describe(answer(work, where, request), explain=request.explain)


def prepare(recipe: Recipe, request: Request) -> tuple[Work, Where]:
    """What a step is made of and what does it, with what was measured in place of assumptions."""
    work = work_of(recipe, measure_offline(recipe), request.wishes)
    device, have = find_device(request.device, request.device_file), Efficiency()
    if request.calibrate:
        runs = [
            run
            for name in request.calibrate
            for run in (measure_here(recipe) if name == HERE else [read_run(Path(name))])
        ]
        have = calibrate(runs, device)
        wished = request.wishes
        measured = lengths_of(runs, work)
        work = dataclasses.replace(
            measured,
            answer=work.answer if wished.answer_tokens else measured.answer,
            asked=work.asked if wished.critique_tokens else measured.asked,
        )
    return work, Where(request.device, device, have)


def answer(work: Work, where: Where, request: Request) -> Forecast:
    """The plan of the request's layout, or the best one."""
    if request.total is not None:
        return best(_many(work) if request.total > 1 else work, where, request.total)
    groups = sampler_groups(work, where.device), critic_groups(work, where.device)
    trainers = request.trainers or 1
    counts = (request.samplers or trainers, request.critics or trainers)
    layout = Layout(trainers, request.samplers, request.critics, *map(_group, groups, counts))
    return forecast(work, where, layout)


def _group(sizes: Sequence[int], devices: int) -> int:
    """The smallest group that holds the model: as many replicas as can be."""
    fitting = [size for size in sizes if size <= devices]
    return fitting[0] if fitting else 1


def _many(work: Work) -> Work:
    """As it would be set up for many devices: vLLM samples, and the critic is asked all at once."""
    return with_concurrency(dataclasses.replace(work, engine="vllm"))
