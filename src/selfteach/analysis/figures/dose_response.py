"""Draw a study whose arms or variants differ by degree: a measure against their position.

Left, Avg@k against the position. Right, what may explain it: how far the untrained
self-teacher's advantages concentrate on the first wrong step (arms on the axis), or the headline's
differences (variants on the axis). Intervals are 95 %, those of the results.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from selfteach.analysis.figures.palette import PALETTE
from selfteach.analysis.figures.style import (
    INK,
    PHONE_WIDTH,
    SMALL,
    TINY,
    ArmStyle,
    bare,
    legend,
    shortened,
    styles,
)
from selfteach.analysis.results_text import Estimate, Results, headline_pairs, pair_title

MAIN = "main"
"""The main setting among variants."""
LINE = ArmStyle(PALETTE[1].light, "-", "o")
"""Style of the line through the arms on the axis."""

Point = tuple[float, Estimate]
"""A position and the estimate there."""


def along_axis(
    results: Results, localisation: Mapping[str, Any] | None, *, phone: bool = False
) -> Figure | None:
    """Draw measures against position; None without an axis or with fewer than two positions."""
    axis = results.get("axis")
    if not axis or len(axis["at"]) < 2:
        return None
    at = dict(sorted(axis["at"].items(), key=lambda item: item[1]))
    of_arms = at.keys() <= results["arms"].keys()
    right = _concentration(results, at, localisation) if of_arms else _differences(results, at)
    count = 1 + bool(right)
    size = (PHONE_WIDTH, 3.2 * count) if phone else (4.6 * count, 3.5)
    figure = Figure(figsize=size, layout="constrained")
    panels = list(figure.subplots(*((count, 1) if phone else (1, count)), squeeze=False).flat)
    look = styles(results["arms"])
    if of_arms:
        _line(panels[0], [(x, results["arms"][arm]["avg"]) for arm, x in at.items()], LINE, "")
        for name in (n for n in results["arms"] if n not in at):
            _level(panels[0], name, results["arms"][name]["avg"], look[name])
    else:
        for name in results["arms"]:
            _line(panels[0], _in_settings(results, at, "arms", name), look[name], name)
    panels[0].set_ylabel(f"Avg@{results['k']}, %", color=INK, fontsize=SMALL)
    panels[0].set_ylim(bottom=0)
    if right:
        _draw_explanation(panels[1], right, "" if of_arms else "points")
    for panel in panels:
        bare(panel)
        panel.set_xlabel(axis["label"], color=INK, fontsize=SMALL, parse_math=False)
        legend(panel, columns=2)
    return figure


def axis_lines(results: Results) -> list[str]:
    """Describe what is at each position of the axis, with its Avg@k."""
    axis = results["axis"]
    lines = []
    for name, x in sorted(axis["at"].items(), key=lambda item: item[1]):
        arms = (
            {name: results["arms"][name]}
            if name in results["arms"]
            else _setting(results, name)["arms"]
        )
        means = ", ".join(f"{name} {arm['avg']['mean']:.1f}" for name, arm in arms.items())
        lines.append(f"{axis['label']} {x:g}: {means}")
    return lines


def _setting(results: Results, name: str) -> Results:
    return results if name == MAIN else results["variants"][name]


def _in_settings(results: Results, at: Mapping[str, float], table: str, row: str) -> list[Point]:
    """Return an arm's (or a pair's) Avg@k in every setting on the axis that has it."""
    rows = [(x, _setting(results, name)[table].get(row)) for name, x in at.items()]
    return [(x, measures["avg"]) for x, measures in rows if measures is not None]


def _differences(results: Results, at: Mapping[str, float]) -> dict[str, list[Point]]:
    return {
        pair_title(pair): _in_settings(results, at, "paired", pair)
        for pair in headline_pairs(results)
    }


def _concentration(
    results: Results, at: Mapping[str, float], localisation: Mapping[str, Any] | None
) -> dict[str, list[Point]]:
    """Return concentration by position, if the untrained model was inspected under all contexts."""
    inspected = {} if localisation is None else localisation["contexts"]
    contexts = [results["arms"][arm].get("settings", {}).get("context") for arm in at]
    if len(set(contexts)) < len(contexts) or not inspected.keys() >= set(contexts):
        return {}
    values = [inspected[name]["concentration"] for name in contexts]
    if None in values:
        return {}
    title = "mean |advantage|: first wrong step / right steps before it"
    return {title: list(zip(at.values(), values, strict=True))}


def _draw_explanation(axes: Axes, lines: Mapping[str, Sequence[Point]], unit: str) -> None:
    look = [LINE, *styles(map(str, range(len(lines)))).values()]
    for (name, points), style in zip(lines.items(), look, strict=False):
        _line(axes, points, style, name)
    if unit:
        axes.axhline(0, color=INK, linewidth=0.9)
        axes.set_ylabel(f"difference, {unit}", color=INK, fontsize=SMALL)
    else:
        axes.set_ylabel("concentration", color=INK, fontsize=SMALL)
        axes.set_ylim(bottom=0)


def _line(axes: Axes, points: Sequence[Point], style: ArmStyle, name: str) -> None:
    """Draw estimates with their intervals, joined by a line."""
    if not points:
        return
    x, values = zip(*points, strict=True)
    means = [value["mean"] for value in values]
    below = [mean - value["ci95"][0] for mean, value in zip(means, values, strict=True)]
    above = [value["ci95"][1] - mean for mean, value in zip(means, values, strict=True)]
    axes.errorbar(
        x, means, yerr=[below, above], color=style.colour, linestyle=style.dash,
        marker=style.marker, markersize=5, linewidth=1.8, capsize=3, label=name or None,
    )  # fmt: skip


def _level(axes: Axes, name: str, value: Estimate, style: ArmStyle) -> None:
    """Draw an arm that has no position on the axis: a line across, with a band."""
    low, high = value["ci95"]
    axes.axhspan(low, high, color=style.colour, alpha=0.12, linewidth=0)
    axes.axhline(value["mean"], color=style.colour, linestyle=style.dash, linewidth=1.5)
    axes.annotate(
        shortened(name, 24), (1, value["mean"]), xycoords=("axes fraction", "data"), xytext=(-4, 3),
        ha="right", textcoords="offset points", color=INK, fontsize=TINY, parse_math=False,
    )  # fmt: skip
