"""How a step's time falls with the number of devices, as a figure that can be read without colour."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from selfteach.analysis.figures.style import GRID, INK, SMALL, SPARE, TINY, bare, legend, save
from selfteach.errors import RecipeError
from selfteach.planning.estimate import Forecast, Where, best, with_concurrency
from selfteach.planning.workload import Work

COUNTS = tuple(2**n for n in range(11))
"""1 to 1,024 devices."""
STALENESS = (0, 1, 4)
"""Lines of the figure, besides the plan's own."""
HELPED = 1.05
"""Where a step is at most so much slower than on all devices, more of them have stopped to help."""


@dataclass(frozen=True, slots=True)
class Scaling:
    """One line: the best plan on at most so many devices."""

    staleness: int
    counts: tuple[int, ...]
    plans: tuple[Forecast, ...]

    @property
    def stop(self) -> int:
        """Index from which on more devices do not help."""
        last = self.plans[-1].period
        return next(at for at, plan in enumerate(self.plans) if plan.period <= HELPED * last)


def scaling(work: Work, where: Where, counts: Sequence[int] = COUNTS) -> list[Scaling]:
    """Lines for `STALENESS` and the work's own. Raises `RecipeError` if no count holds the work."""
    return [_line(work, where, s, counts) for s in sorted({*STALENESS, work.staleness})]


def rows(lines: Sequence[Scaling]) -> Iterator[str]:
    """The figure as a table in Markdown."""
    yield (
        "| devices | " + " | ".join(f"staleness {line.staleness}" for line in lines) + " | split |"
    )
    yield "|---|" + "---|" * (len(lines) + 1)
    last = lines[-1]
    for count, plan in zip(last.counts, last.plans, strict=True):
        times = [f"{line.plans[line.counts.index(count)].period:,.3g} s" for line in lines]
        at = plan.layout
        split = f"{at.trainers} learn, {at.samplers} sample, {at.critics} mark"
        yield f"| {count:,} | {' | '.join(times)} | {split} |"


def draw(lines: Sequence[Scaling], title: str) -> Figure:
    """Step time against devices, both on logarithmic axes; where a line stops, and why, is written."""
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes = figure.add_subplot()
    bare(axes, grid="both")
    for line, style in zip(lines, SPARE, strict=False):
        times = [plan.period for plan in line.plans]
        axes.plot(
            line.counts, times, color=style.colour, linestyle=style.dash, marker=style.marker,
            markersize=5, linewidth=1.8, label=f"staleness {line.staleness}",
        )  # fmt: skip
        at = line.counts[line.stop], times[line.stop]
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
    """Where each line stops, and why; the circles of the figure in words."""
    for line in lines:
        plan = line.plans[line.stop]
        yield (
            f"staleness {line.staleness}: stops at {line.counts[line.stop]:,} devices, "
            f"{plan.period:,.3g} s: {plan.bottleneck}"
        )


def write(lines: Sequence[Scaling], title: str, path: Path) -> list[Path]:
    """The figure as SVG and PNG."""
    return save(draw(lines, title), path)


def _line(work: Work, where: Where, staleness: int, counts: Sequence[int]) -> Scaling:
    """Best plans; a count that holds nothing is left out, one that gains nothing repeats the last."""
    found: list[tuple[int, Forecast]] = []
    reason: RecipeError | None = None
    for count in counts:
        try:
            plan = best(with_concurrency(replace(work, staleness=staleness)), where, count)
        except RecipeError as error:
            reason = error
            continue
        if found and found[-1][1].period <= plan.period:
            plan = found[-1][1]
        found.append((count, plan))
    if not found:
        assert reason is not None
        raise reason
    return Scaling(staleness, *map(tuple, zip(*found, strict=True)))  # type: ignore[arg-type]


def _ideal(axes: Axes, line: Scaling) -> None:
    """What twice the devices in half the time would be."""
    first, time = line.counts[0], line.plans[0].period
    axes.plot(
        line.counts, [time * first / count for count in line.counts], color=GRID, linewidth=1.2,
        linestyle=(0, (1, 3)), label="in proportion",
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
