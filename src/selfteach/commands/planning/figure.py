"""Plot step time against the number of devices; the figure is readable without colour."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from selfteach.analysis.figures.style import GRID, INK, SMALL, SPARE, TINY, bare, legend, save
from selfteach.commands.planning.estimate import (
    Forecast,
    Hardware,
    best_forecast,
    with_full_concurrency,
)
from selfteach.commands.planning.workload import StepWork
from selfteach.errors import RecipeError

COUNTS = tuple(2**n for n in range(11))
"""1 to 1,024 devices."""
STALENESS = (0, 1, 4)
"""Lines of the figure, besides the plan's staleness."""
SATURATION_RATIO = 1.05
"""More devices no longer help where a step is at most this much slower than on all devices."""


@dataclass(frozen=True, slots=True)
class Scaling:
    """Holds one line of the figure: the best plan for each number of devices."""

    staleness: int
    counts: tuple[int, ...]
    plans: tuple[Forecast, ...]

    @property
    def saturation(self) -> int:
        """Return the index from which on more devices do not help."""
        limit = SATURATION_RATIO * self.plans[-1].period
        return next(i for i, plan in enumerate(self.plans) if plan.period <= limit)


def scaling(work: StepWork, hardware: Hardware, counts: Sequence[int] = COUNTS) -> list[Scaling]:
    """Return a line for each of `STALENESS` and for the work's staleness.

    Raises `RecipeError` if no number of devices holds the work.
    """
    return [_line(work, hardware, s, counts) for s in sorted({*STALENESS, work.staleness})]


def rows(lines: Sequence[Scaling]) -> Iterator[str]:
    """Yield the figure as a Markdown table."""
    yield (
        "| devices | " + " | ".join(f"staleness {line.staleness}" for line in lines) + " | split |"
    )
    yield "|---|" + "---|" * (len(lines) + 1)
    last = lines[-1]
    for count, plan in zip(last.counts, last.plans, strict=True):
        times = [f"{line.plans[line.counts.index(count)].period:,.3g} s" for line in lines]
        at = plan.layout
        split = f"{at.trainers} train, {at.samplers} sample, {at.critics} serve the critic"
        yield f"| {count:,} | {' | '.join(times)} | {split} |"


def draw(lines: Sequence[Scaling], title: str) -> Figure:
    """Plot step time against devices on logarithmic axes; circles and text mark where lines flatten."""
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes = figure.add_subplot()
    bare(axes, grid="both")
    for line, style in zip(lines, SPARE, strict=False):
        times = [plan.period for plan in line.plans]
        axes.plot(
            line.counts, times, color=style.colour, linestyle=style.dash, marker=style.marker,
            markersize=5, linewidth=1.8, label=f"staleness {line.staleness}",
        )  # fmt: skip
        at = line.counts[line.saturation], times[line.saturation]
        axes.plot(*at, marker="o", markersize=12, markerfacecolor="none", color=INK, linestyle="")
    _ideal(axes, lines[-1])
    _scales(axes, lines)
    axes.set_xlabel("devices", color=INK, fontsize=SMALL)
    axes.set_ylabel("seconds per step", color=INK, fontsize=SMALL)
    legend(axes)
    figure.suptitle(title, x=0.01, ha="left", color=INK, fontsize=SMALL, parse_math=False)
    figure.supxlabel("\n".join(reasons(lines)), x=0.01, ha="left", color=INK, fontsize=TINY)
    return figure


def reasons(lines: Sequence[Scaling]) -> Iterator[str]:
    """Yield where each line flattens, and why: the circles of the figure in words."""
    for line in lines:
        plan = line.plans[line.saturation]
        yield (
            f"staleness {line.staleness}: no gain beyond {line.counts[line.saturation]:,} devices, "
            f"{plan.period:,.3g} s: {plan.bottleneck}"
        )


def write(lines: Sequence[Scaling], title: str, path: Path) -> list[Path]:
    """Write the figure as SVG and PNG; return both paths."""
    return save(draw(lines, title), path)


def _line(work: StepWork, hardware: Hardware, staleness: int, counts: Sequence[int]) -> Scaling:
    """Return the best plans; too few devices are left out, devices without gain repeat the last."""
    plans: list[tuple[int, Forecast]] = []
    concurrent = with_full_concurrency(replace(work, staleness=staleness))
    reason: RecipeError | None = None
    for count in counts:
        try:
            plan = best_forecast(concurrent, hardware, count)
        except RecipeError as error:
            reason = error
            continue
        if plans and plans[-1][1].period <= plan.period:
            plan = plans[-1][1]
        plans.append((count, plan))
    if not plans:
        assert reason is not None
        raise reason
    return Scaling(staleness, *map(tuple, zip(*plans, strict=True)))  # type: ignore[arg-type]


def _ideal(axes: Axes, line: Scaling) -> None:
    """Plot linear scaling: twice the devices, half the time."""
    first, time = line.counts[0], line.plans[0].period
    axes.plot(
        line.counts, [time * first / count for count in line.counts], color=GRID, linewidth=1.2,
        linestyle=(0, (1, 3)), label="linear scaling",
    )  # fmt: skip


def _scales(axes: Axes, lines: Sequence[Scaling]) -> None:
    counts = sorted({count for line in lines for count in line.counts})
    times = [plan.period for line in lines for plan in line.plans]
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_ylim(min(times) / 1.6, max(times) * 1.4)
    axes.xaxis.set_major_locator(FixedLocator(counts))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.4g}"))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
