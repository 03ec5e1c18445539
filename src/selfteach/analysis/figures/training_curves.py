"""Draw figures over training and over k.

A line is the mean over an arm's seeds, its band reaches from the worst seed to the best.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from selfteach.analysis.figures.style import ALERT, INK, SMALL, ArmStyle, bare, legend, styles
from selfteach.analysis.health_checks import WINDOW, HealthCheck, smoothed
from selfteach.analysis.run_data import Groups, RunData, evaluations
from selfteach.evaluation.intervals import PERCENT, mean_interval
from selfteach.evaluation.statistics import pass_at_k

REWARD_MEAN = re.compile(r"rewards/(.+)/mean")
"""Matches the metric of a reward's mean."""
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
SHADES = ("#0072B2", "#E69F00", "#009E73", "#CC79A7")


def over_seeds(runs: Sequence[RunData], metric: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Return steps [E] that every run has logged, and values [S, E], averaged over `WINDOW` steps.

    Runs without the metric are left out; None if no step is left.
    """
    series = [dict(zip(*run.series(metric), strict=True)) for run in runs]
    series = [by_step for by_step in series if by_step]
    steps = sorted(set.intersection(*map(set, series))) if series else []
    if not steps:
        return None
    values_SE = np.stack([smoothed(np.array([by_step[s] for s in steps])) for by_step in series])
    return np.array(steps)[-values_SE.shape[1] :], values_SE


def check_curve(groups: Groups, check: HealthCheck) -> Figure:
    """Draw one failure mode's metric over training, with the threshold of its warning."""
    figure = Figure(figsize=(5.2, 2.5), layout="constrained")
    axes = figure.add_subplot()
    _panel(axes, groups, check.metric, check.unit)
    if check.limit is not None:
        axes.axhline(
            check.limit, color=ALERT, linestyle=(0, (1, 2)), linewidth=1.4, label="warning"
        )
        axes.relim()
        axes.autoscale(axis="y")
        _limit_zoom(axes)
    legend(axes, columns=3)
    return figure


def training(groups: Groups) -> Figure:
    """Draw the share of correct rollouts and the loss, which does not compare across objectives."""
    return _panels(groups, {"correct": "share right", "loss": "loss"})


def rewards(groups: Groups) -> Figure | None:
    """Draw the mean total reward of the training rollouts, and that of each reward by its name.

    None if no run has rewards besides the verdict.
    """
    runs = [run for of_arm in groups.values() for run in of_arm]
    keys = dict.fromkeys(key for run in runs for row in run.of_kind("step") for key in row)
    names = [match[1] for key in keys if (match := REWARD_MEAN.fullmatch(key))]
    if "reward" not in keys:
        return None
    shown = names if len(names) > 1 else []
    return _grid(groups, {"reward": "total reward", **{f"rewards/{n}/mean": n for n in shown}})


def length_and_entropy(groups: Groups) -> Figure:
    """Draw mean length (tokens) and entropy (nats per token) of the training rollouts."""
    return _panels(groups, {"length": "length, tokens", "entropy": "entropy, nats per token"})


def pass_at_each_k(groups: Groups) -> Figure | None:
    """Draw unbiased Pass@k on test problems (percent) against k < n, with 95 % bands.

    At k = n it would be plain any-correct, so n itself is left out. None without test evaluations.
    """
    figure = Figure(figsize=(7.2, 3.6), layout="constrained")
    axes = figure.add_subplot()
    bare(axes)
    look, drawn = styles(groups), False
    for name, runs in groups.items():
        tables = [saved[max(saved)] for run in runs if (saved := evaluations(run, "test"))]
        shapes = {(e.k, len(e.problem_ids)) for e in tables}
        if len(shapes) != 1 or (n := tables[0].k) < 2:
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
    axes.set_xlabel("k", color=INK, fontsize=SMALL)
    axes.set_ylabel("Pass@k on test, %", color=INK, fontsize=SMALL)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    legend(axes)
    return figure if drawn else None


def seconds_by_phase(budgets: Mapping[str, Mapping[str, float]]) -> Figure | None:
    """Draw each arm's seconds by phase, from `run_budget.arm_budget`. None if nothing was timed."""
    if not any(budget["seconds"] for budget in budgets.values()):
        return None
    figure = Figure(figsize=(7.2, 0.9 + 0.34 * len(budgets)), layout="constrained")
    axes = figure.add_subplot()
    bare(axes, grid="x")
    left = np.zeros(len(budgets))
    for (key, (label, hatch)), shade in zip(PHASE_STYLES.items(), SHADES, strict=True):
        width = np.array([budget.get(key, 0.0) for budget in budgets.values()])
        axes.barh(
            range(len(budgets)), width, left=left, height=0.62, label=label, color=shade,
            hatch=hatch, edgecolor="#ffffff", linewidth=0.6,
        )  # fmt: skip
        left += width
    axes.set_yticks(range(len(budgets)), list(budgets), color=INK, fontsize=SMALL, parse_math=False)
    axes.set_ylim(len(budgets) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("seconds per run", color=INK, fontsize=SMALL)
    legend(axes)
    return figure


def _panels(groups: Groups, metrics: dict[str, str]) -> Figure:
    return _grid(groups, metrics, columns=len(metrics), height=3.1)


def _grid(
    groups: Groups, metrics: dict[str, str], *, columns: int = 2, height: float = 2.8
) -> Figure:
    """Draw a panel per metric, with one legend above them."""
    columns = min(columns, len(metrics))
    rows = -(-len(metrics) // columns)
    figure = Figure(figsize=(7.2, height * rows), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, (metric, label) in zip(panels, metrics.items(), strict=False):
        _panel(axes, groups, metric, label)
        axes.yaxis.label.set_parse_math(False)
    for axes in panels[len(metrics) :]:
        axes.set_visible(False)
    handles, labels = panels[0].get_legend_handles_labels()
    if handles:
        lines = -(-len(handles) // 4)
        shown = figure.legend(
            handles, labels, loc="outside upper left", ncols=-(-len(handles) // lines),
            frameon=False, fontsize=SMALL, labelcolor=INK, handlelength=3.4,
        )  # fmt: skip
        for text in shown.get_texts():
            text.set_parse_math(False)
    return figure


def _panel(axes: Axes, groups: Groups, metric: str, label: str) -> None:
    bare(axes)
    look = styles(groups)
    for name, runs in groups.items():
        if (series := over_seeds(runs, metric)) is None:
            continue
        steps_E, values_SE = series
        _line(axes, steps_E, values_SE.mean(0), look[name], name)
        if len(values_SE) > 1:
            axes.fill_between(
                steps_E, values_SE.min(0), values_SE.max(0), color=look[name].colour,
                alpha=0.14, linewidth=0,
            )  # fmt: skip
    axes.set_xlabel(f"training step (means of {WINDOW})", color=INK, fontsize=SMALL)
    axes.set_ylabel(label, color=INK, fontsize=SMALL)
    _limit_zoom(axes)


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
    axes.plot(
        x, y, color=style.colour, linestyle=style.dash, marker=style.marker, markersize=4.5,
        markevery=max(1, len(x) // MARKERS), linewidth=1.8, label=name,
    )  # fmt: skip
