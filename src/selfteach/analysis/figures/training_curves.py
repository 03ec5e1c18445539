"""Draw figures over training and over k.

A line is the mean over an arm's seeds, its band reaches from the worst seed to the best.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from selfteach.analysis.figures.palette import PALETTE
from selfteach.analysis.figures.style import (
    ALERT,
    INK,
    PHONE_WIDTH,
    SMALL,
    ArmStyle,
    bare,
    figure_legend,
    legend,
    shortened,
    step_axis,
    styles,
)
from selfteach.analysis.health_checks import WINDOW, HealthCheck, HealthWarning, is_logged, smoothed
from selfteach.analysis.run_data import Groups, RunData, evaluations
from selfteach.evaluation.intervals import PERCENT, mean_interval
from selfteach.evaluation.statistics import pass_at_k

MARKERS = 6
"""Markers on a line of many points."""
LEAST_SPAN = 0.3
"""Share of the largest value that a y axis spans at least."""
PHASE_STYLES = {
    "time/rollout": ("sampling", ""),
    "time/critique": ("critique", "//"),
    "time/train": ("training", ".."),
    "time/evaluate": ("evaluation", "xx"),
}
"""Phases of a run: names and hatches (colour alone does not tell them apart)."""
SHADES = tuple(PALETTE[i].light for i in (1, 15, 0, 10))
MOST_NAMED = 12
"""Arms in a small figure's legend; of more, only those with a warning are named there."""
OTHERS = ArmStyle("#8a8f98", "-", "")
"""Style of the arms that are not named."""


def over_seeds(
    runs: Sequence[RunData], metric: str, width: int = WINDOW
) -> tuple[np.ndarray, np.ndarray] | None:
    """Return steps [E] that every run has logged, and values [S, E], averaged over ``width`` steps.

    Runs without the metric are left out; None if no step is left.
    """
    series = [dict(zip(*run.series(metric), strict=True)) for run in runs]
    series = [by_step for by_step in series if by_step]
    steps = sorted(set.intersection(*map(set, series))) if series else []
    if not steps:
        return None
    values_SE = np.stack(
        [smoothed(np.array([by_step[s] for s in steps]), width) for by_step in series]
    )
    return np.array(steps)[-values_SE.shape[1] :], values_SE


def check_curve(groups: Groups, check: HealthCheck, warned: Sequence[HealthWarning] = ()) -> Figure:
    """Draw one failure mode's metric over training, with the threshold of its warning.

    Every warned run is drawn, also where its arm's mean hides it, with a ring where the warning is,
    or a dashed line where its values are no numbers.
    """
    figure = Figure(figsize=(4.4, 2.5), layout="constrained")
    axes = figure.add_subplot()
    arms = {warning.arm for warning in warned}
    width = _panel(axes, groups, check.metric, check.unit, warned=arms)
    look = styles(groups)
    for warning in warned:
        _warned_run(axes, groups[warning.arm], warning, look[warning.arm], width)
    if check.limit is not None:
        axes.axhline(
            check.limit, color=ALERT, linestyle=(0, (1, 2)), linewidth=1.4, label="threshold"
        )
    axes.relim()
    axes.autoscale()
    step_axis(axes, axes.get_xlabel())
    _limit_zoom(axes)
    legend(axes, columns=3)
    return figure


def _warned_run(
    axes: Axes, runs: Sequence[RunData], warning: HealthWarning, style: ArmStyle, width: int
) -> None:
    """Draw the run of a warning, if it is not its arm's line already, and where the warning is."""
    for run in (run for run in runs if run.seed == warning.seed):
        steps_E, values_E = run.series(warning.check.metric)
        values_E = smoothed(values_E, width)
        steps_E = steps_E[-len(values_E) :]
        if len(runs) > 1:
            name = f"{shortened(warning.arm)}, seed {warning.seed}"
            axes.plot(
                steps_E, _finite(values_E), color=style.colour, linewidth=1.0, label=name,
                marker="." if len(steps_E) == 1 else None,
            )  # fmt: skip
        at = int(np.abs(steps_E - warning.step).argmin())
        titled = axes.get_legend_handles_labels()[1]
        if np.isfinite(values_E[at]):
            axes.plot(
                [steps_E[at]], [values_E[at]], marker="o", markersize=10, markerfacecolor="none",
                markeredgecolor=ALERT, markeredgewidth=1.6, linestyle="none",
                label="" if "warning" in titled else "warning",
            )  # fmt: skip
        else:
            title = f"{shortened(warning.arm)}: no number"
            axes.axvline(warning.step, color=ALERT, linestyle="--", linewidth=1.4, label=title)


def training(groups: Groups, *, phone: bool = False) -> Figure:
    """Draw the share of correct rollouts and the loss, which does not compare across objectives."""
    return _panels(groups, {"correct": "share right", "loss": "loss"}, phone)


def length_and_entropy(groups: Groups, *, phone: bool = False) -> Figure:
    """Draw mean length (tokens) and entropy (nats per token) of the training rollouts."""
    titles = {"length": "length, tokens", "entropy": "entropy, nats per token"}
    return _panels(groups, titles, phone)


def pass_at_each_k(groups: Groups, *, phone: bool = False) -> Figure | None:
    """Draw unbiased Pass@k on test problems (percent) against k < n, with 95 % bands.

    At k = n it would be plain any-correct, so n itself is left out. None without test evaluations, and
    with two answers per problem or fewer, which give a single point.
    """
    figure = Figure(figsize=(PHONE_WIDTH, 3.2) if phone else (7.2, 3.6), layout="constrained")
    axes = figure.add_subplot()
    bare(axes)
    look, drawn = styles(groups), False
    for name, runs in groups.items():
        tables = [saved[max(saved)] for run in runs if (saved := evaluations(run, "test"))]
        shapes = {(e.k, len(e.problem_ids)) for e in tables}
        if len(shapes) != 1 or (n := tables[0].k) < 3:
            continue
        ks = range(1, n)
        estimates = [
            mean_interval(
                [100 * pass_at_k(np.array(e.correct, dtype=float), k) for e in tables],
                bounds=PERCENT,
            )
            for k in ks
        ]
        _line(axes, np.array(ks), np.array([e.mean for e in estimates]), look[name], name)
        low, high = [e.low for e in estimates], [e.high for e in estimates]
        axes.fill_between(ks, low, high, color=look[name].colour, alpha=0.12, linewidth=0)
        drawn = True
    step_axis(axes, "k")
    axes.set_ylabel("Pass@k on test, %", color=INK, fontsize=SMALL)
    legend(axes)
    return figure if drawn else None


def timed_phases(budgets: Mapping[str, Mapping[str, float]]) -> dict[str, tuple[str, str]]:
    """Return the phases in which some arm spent time, with their names and hatches."""
    return {
        key: names
        for key, names in PHASE_STYLES.items()
        if any(budget.get(key) for budget in budgets.values())
    }


def seconds_by_phase(
    budgets: Mapping[str, Mapping[str, float]], *, phone: bool = False
) -> Figure | None:
    """Draw each arm's seconds by phase, from `run_budget.arm_budget`. None if nothing was timed."""
    phases = timed_phases(budgets)
    if not phases:
        return None
    width = PHONE_WIDTH if phone else 7.2
    figure = Figure(figsize=(width, 0.9 + 0.34 * len(budgets)), layout="constrained")
    axes = figure.add_subplot()
    bare(axes, grid="x")
    left = np.zeros(len(budgets))
    shades = dict(zip(PHASE_STYLES, SHADES, strict=True))
    for key, (label, hatch) in phases.items():
        width = np.array([budget.get(key, 0.0) for budget in budgets.values()])
        axes.barh(
            range(len(budgets)), width, left=left, height=0.62, label=label, color=shades[key],
            hatch=hatch, edgecolor=INK, linewidth=0.6,
        )  # fmt: skip
        left += width
    names = [shortened(name, 20 if phone else 44) for name in budgets]
    axes.set_yticks(range(len(budgets)), names, color=INK, fontsize=SMALL, parse_math=False)
    axes.set_ylim(len(budgets) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("seconds per run", color=INK, fontsize=SMALL)
    legend(axes)
    return figure


def _panels(groups: Groups, metrics: Mapping[str, str], phone: bool) -> Figure:
    """Draw a panel per metric that some run has logged, side by side, on a phone one above another."""
    metrics = {metric: label for metric, label in metrics.items() if is_logged(groups, metric)}
    count = len(metrics)
    size = (PHONE_WIDTH, 0.6 + 2.2 * count) if phone else (3.6 * count, 3.1)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(*((count, 1) if phone else (1, count)), squeeze=False).flat
    panels = list(panels)
    for axes, (metric, label) in zip(panels, metrics.items(), strict=True):
        _panel(axes, groups, metric, label)
    named = max(panels, key=lambda axes: len(axes.get_lines()))
    figure_legend(figure, named)
    return figure


def _panel(
    axes: Axes, groups: Groups, metric: str, label: str, warned: Collection[str] | None = None
) -> int:
    """Draw a metric of all arms; return over how many steps the values are averaged.

    Short runs are drawn step by step: the mean over all their steps would be a single point. With
    ``warned``, of more than `MOST_NAMED` arms only these are named.
    """
    bare(axes)
    look, width = styles(groups), _width(groups, metric)
    if warned is not None and len(groups) > MOST_NAMED:
        look = {name: look[name] if name in warned else OTHERS for name in groups}
    has_others = False
    for name, runs in groups.items():
        if (series := over_seeds(runs, metric, width)) is None:
            continue
        (steps_E, values_SE), style = series, look[name]
        title = name if style is not OTHERS else "" if has_others else "other arms"
        has_others |= style is OTHERS
        _line(axes, steps_E, values_SE.mean(0), style, title)
        if len(values_SE) > 1 and style is not OTHERS:
            axes.fill_between(
                steps_E, values_SE.min(0), values_SE.max(0), color=style.colour,
                alpha=0.14, linewidth=0,
            )  # fmt: skip
    step_axis(axes, "training step" if width == 1 else f"training step (means of {width})")
    axes.set_ylabel(label, color=INK, fontsize=SMALL)
    _limit_zoom(axes)
    return width


def _width(groups: Groups, metric: str) -> int:
    """Return `WINDOW`, or 1 where it would leave fewer than `WINDOW` points of some run."""
    lengths = [len(run.series(metric)[1]) for runs in groups.values() for run in runs]
    return WINDOW if all(not n or n >= 2 * WINDOW - 1 for n in lengths) else 1


def _finite(values: np.ndarray) -> np.ndarray:
    """Return values with NaN, which is not drawn, for infinities."""
    return np.where(np.isfinite(values), values, np.nan)


def _limit_zoom(axes: Axes) -> None:
    """Keep the y axis from enlarging noise: it spans at least `LEAST_SPAN`, and from 0 if near."""
    low, high = axes.get_ylim()
    drawn = [np.asarray(line.get_ydata(), dtype=float) for line in axes.get_lines()]
    values = np.concatenate(drawn) if drawn else np.zeros(1)
    values = values[np.isfinite(values)]
    least, most = (values.min(), values.max()) if len(values) else (0.0, 0.0)
    missing = max(0.0, LEAST_SPAN * max(abs(least), abs(most), 1e-3) - (high - low)) / 2
    low, high = low - missing, high + missing
    if least >= 0 and (low < 0 or low < LEAST_SPAN * high):
        low = 0.0
    axes.set_ylim(low, high)


def _line(axes: Axes, x: np.ndarray, y: np.ndarray, style: ArmStyle, name: str) -> None:
    marker = style.marker or ("." if len(x) == 1 else "")
    axes.plot(
        x, _finite(y), color=style.colour, linestyle=style.dash, marker=marker, markersize=4.5,
        markevery=max(1, len(x) // MARKERS), linewidth=0.8 if style is OTHERS else 1.8, label=name,
    )  # fmt: skip
