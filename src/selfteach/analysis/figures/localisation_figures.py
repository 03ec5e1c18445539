"""Draw an inspection: where a context moves the self-teacher, and how well it detects wrong steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from selfteach.analysis.figures import style
from selfteach.analysis.figures.style import (
    ALERT,
    INK,
    PHONE_WIDTH,
    SMALL,
    TINY,
    ArmStyle,
    bare,
    shortened,
)

PER_ROW = 3
"""Panels in a row."""
MIN_ROLLOUTS = 20
"""Rollouts that a point of the aligned curve needs; with fewer it is not drawn."""
DETECTION_MEASURES = (("auroc", "area under the ROC curve", 1.0, 0.5), ("f1", "F1, %", 100.0, None))
"""Measure, title, largest value, and value of guessing."""


def aligned_advantage(localisation: Mapping[str, Any], *, phone: bool = False) -> Figure | None:
    """Draw mean A (nats) by distance to the first wrong step's first token, a panel per context.

    The band is the 95 % interval over problems. Panels share both axes. Contexts of too few rollouts
    for a curve (`with_curve`) have no panel; None if there is no other.
    """
    names = with_curve(localisation)
    if not names:
        return None
    per_row = min(1 if phone else PER_ROW, len(names))
    rows = -(-len(names) // per_row)
    size = (PHONE_WIDTH if phone else 9.2, 0.7 + 1.75 * rows)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(rows, per_row, sharex=True, sharey=True, squeeze=False)
    look = style.styles(localisation["contexts"])
    for axes, name in zip(panels.flat, names, strict=False):
        _aligned_panel(axes, localisation["contexts"][name]["aligned"], look[name])
        title = shortened(name, 30)
        axes.set_title(title, loc="left", color=INK, fontsize=SMALL, pad=3, parse_math=False)
    for axes in list(panels.flat)[len(names) :]:
        axes.set_visible(False)
    figure.supxlabel("tokens from the beginning of the first wrong step", color=INK, fontsize=SMALL)
    figure.supylabel("mean advantage, nats", color=INK, fontsize=SMALL)
    return figure


def with_curve(localisation: Mapping[str, Any]) -> list[str]:
    """Return the contexts of which the aligned advantage can be drawn: a line needs two points."""
    contexts = localisation["contexts"].items()
    return [name for name, context in contexts if len(_curve(context["aligned"])) > 1]


def mass_by_region(localisation: Mapping[str, Any], *, phone: bool = False) -> Figure | None:
    """Draw the share of |A| (percent) before, on and after the first wrong step, with intervals.

    None if no context has one.
    """
    titles = {"before": "right steps before it", "failing": "first wrong step", "after": "after it"}
    contexts = {
        name: context for name, context in localisation["contexts"].items()
        if any(context["mass"][region] is not None for region in titles)
    }  # fmt: skip
    if not contexts:
        return None
    figure, panels = _rows_of_panels(list(contexts), 3, phone)
    look = style.styles(localisation["contexts"])
    for axes, (region, title) in zip(panels, titles.items(), strict=True):
        for row, (name, context) in enumerate(contexts.items()):
            _bar(axes, row, context["mass"][region], look[name].colour, hatch="")
        axes.set_xlim(0, 100)
        axes.set_title(title, loc="left", color=INK, fontsize=SMALL, pad=3)
    figure.supxlabel("share of |advantage|, %", color=INK, fontsize=SMALL)
    return figure


def step_detection(localisation: Mapping[str, Any], *, phone: bool = False) -> Figure | None:
    """Draw how well each context detects wrong steps, beside baselines (hatched) that need no context.

    A dagger marks contexts that reveal where the first error is, or whether there is one. Measures
    without a value have no panel; None if none has one.
    """
    scores = localisation["step_scores"]
    contexts, baselines = scores["contexts"], scores["baselines"]
    rows = [*contexts.items(), *baselines.items()]
    measures = [m for m in DETECTION_MEASURES if any(score[m[0]] is not None for _, score in rows)]
    if not measures:
        return None
    names = [f"{n} †" if c["tells"] in ("where", "whether") else n for n, c in contexts.items()]
    figure, panels = _rows_of_panels([*names, *baselines], len(measures), phone)
    look = style.styles(localisation["contexts"] or contexts)
    for axes, (measure, title, most, chance) in zip(panels, measures, strict=True):
        for row, (name, score) in enumerate(rows):
            has_context = row < len(contexts)
            colour = look[name].colour if has_context else "#8a8f98"
            _bar(axes, row, score[measure], colour, hatch="" if has_context else "///")
        axes.set_xlim(0, 1.02 * most)
        if chance is not None:
            axes.axvline(chance, color=INK, linestyle=":", linewidth=1.2)
        axes.set_xlabel(title, color=INK, fontsize=SMALL)
    if not phone and any(name.endswith(" †") for name in names):
        note = "† reveals where the first error is, or whether there is one"
        figure.supxlabel(note, color=INK, fontsize=TINY)
    return figure


def _aligned_panel(axes: Axes, curve: Mapping[str, Any], style: ArmStyle) -> None:
    bare(axes)
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.axvline(-0.5, color=ALERT, linestyle="--", linewidth=1.3)
    offset, mean, low, high = np.array(_curve(curve)).T
    axes.fill_between(offset, low, high, color=style.colour, alpha=0.25, linewidth=0)
    axes.plot(offset, mean, color=style.colour, linewidth=1.5, marker=style.marker, markersize=3)


def _curve(curve: Mapping[str, Any]) -> list[tuple[float, ...]]:
    """Return offset, mean, and both ends of the interval, where enough rollouts have that offset."""
    return [
        (offset, value["mean"], *value["ci95"])
        for offset, count, value in zip(
            curve["offsets"], curve["answers"], curve["advantage"], strict=True
        )
        if count >= MIN_ROLLOUTS and value is not None
    ]


def _rows_of_panels(names: Sequence[str], count: int, phone: bool) -> tuple[Figure, list[Axes]]:
    """Make panels that share their rows, one per name: in a row, on a phone one above another."""
    height = 0.9 + 0.26 * len(names)
    size = (PHONE_WIDTH, count * height) if phone else (min(9.2, 2 + 3.6 * count), height)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(*((count, 1) if phone else (1, count)), sharey=True, squeeze=False)
    labels = [shortened(name, 22 if phone else 30) for name in names]
    for axes in panels.flat:
        bare(axes, grid="x")
        axes.tick_params(axis="y", length=0)
    panels[0, 0].set_yticks(
        range(len(names)), labels, color=INK, fontsize=SMALL, parse_math=False
    )  # fmt: skip
    panels[0, 0].set_ylim(len(names) - 0.4, -0.6)
    return figure, list(panels.flat)


def _bar(axes: Axes, row: int, value: Mapping[str, Any] | None, colour: str, *, hatch: str) -> None:
    """Draw a bar with its interval below it; nothing without a value."""
    if value is None:
        return
    low, high = value["ci95"]
    axes.barh(
        row - 0.1, value["mean"], height=0.44, color=colour, edgecolor=INK, linewidth=0.6,
        hatch=hatch,
    )  # fmt: skip
    # Below the bar: on a dark one the line would not be seen.
    axes.plot([low, high], [row + 0.24] * 2, color=INK, linewidth=1.6, solid_capstyle="butt")
