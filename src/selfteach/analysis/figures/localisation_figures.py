"""Draw an inspection: where a context moves the self-teacher, and how well it detects wrong steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from selfteach.analysis.figures import style
from selfteach.analysis.figures.style import ALERT, INK, SMALL, TINY, ArmStyle, bare

PER_ROW = 3
"""Panels in a row."""
MIN_ROLLOUTS = 20
"""Rollouts that a point of the aligned curve needs; with fewer it is not drawn."""
DETECTION_MEASURES = (("auroc", "area under the ROC curve", 1.0, 0.5), ("f1", "F1, %", 100.0, None))
"""Measure, title, largest value, and value of guessing."""


def aligned_advantage(localisation: Mapping[str, Any]) -> Figure:
    """Draw mean A (nats) by distance to the first wrong step's first token, a panel per context.

    The band is the 95 % interval over problems. Panels share both axes.
    """
    contexts = localisation["contexts"]
    rows = -(-max(len(contexts), 1) // PER_ROW)
    figure = Figure(figsize=(9.2, 0.7 + 1.75 * rows), layout="constrained")
    panels = figure.subplots(rows, PER_ROW, sharex=True, sharey=True, squeeze=False)
    look = style.styles(contexts)
    for axes, (name, context) in zip(panels.flat, contexts.items(), strict=False):
        _aligned_panel(axes, context["aligned"], look[name])
        axes.set_title(name, loc="left", color=INK, fontsize=SMALL, pad=3, parse_math=False)
    for axes in list(panels.flat)[len(contexts) :]:
        axes.set_visible(False)
    figure.supxlabel("tokens from the beginning of the first wrong step", color=INK, fontsize=SMALL)
    figure.supylabel("mean advantage, nats", color=INK, fontsize=SMALL)
    return figure


def mass_by_region(localisation: Mapping[str, Any]) -> Figure:
    """Draw the share of |A| (percent) before, on and after the first wrong step, with intervals."""
    contexts = localisation["contexts"]
    figure, panels = _rows_of_panels(list(contexts), 3)
    titles = {"before": "right steps before it", "failing": "first wrong step", "after": "after it"}
    look = style.styles(contexts)
    for axes, (region, title) in zip(panels, titles.items(), strict=True):
        for row, (name, context) in enumerate(contexts.items()):
            _bar(axes, row, context["mass"][region], look[name].colour, hatch="")
        axes.set_xlim(0, 100)
        axes.set_title(title, loc="left", color=INK, fontsize=SMALL, pad=3)
    figure.supxlabel("share of |advantage|, %", color=INK, fontsize=SMALL)
    return figure


def step_detection(localisation: Mapping[str, Any]) -> Figure:
    """Draw how well each context detects wrong steps, beside baselines (hatched) that need no context.

    A dagger marks contexts that reveal where the first error is, or whether there is one.
    """
    scores = localisation["step_scores"]
    contexts, baselines = scores["contexts"], scores["baselines"]
    names = [f"{n} †" if c["tells"] in ("where", "whether") else n for n, c in contexts.items()]
    figure, panels = _rows_of_panels([*names, *baselines], len(DETECTION_MEASURES))
    look = style.styles(contexts)
    for axes, (measure, title, most, chance) in zip(panels, DETECTION_MEASURES, strict=True):
        for row, (name, score) in enumerate([*contexts.items(), *baselines.items()]):
            has_context = name in contexts
            colour = look[name].colour if has_context else "#8a8f98"
            _bar(axes, row, score[measure], colour, hatch="" if has_context else "///")
        axes.set_xlim(0, 1.02 * most)
        if chance is not None:
            axes.axvline(chance, color=INK, linestyle=":", linewidth=1.2)
        axes.set_xlabel(title, color=INK, fontsize=SMALL)
    figure.supxlabel(
        "† reveals where the first error is, or whether there is one", color=INK, fontsize=TINY
    )
    return figure


def _aligned_panel(axes: Axes, curve: Mapping[str, Any], style: ArmStyle) -> None:
    bare(axes)
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.axvline(-0.5, color=ALERT, linestyle="--", linewidth=1.3)
    drawn = [
        (offset, value["mean"], *value["ci95"])
        for offset, count, value in zip(
            curve["offsets"], curve["answers"], curve["advantage"], strict=True
        )
        if count >= MIN_ROLLOUTS and value is not None
    ]
    if not drawn:
        return
    offset, mean, low, high = np.array(drawn).T
    axes.fill_between(offset, low, high, color=style.colour, alpha=0.25, linewidth=0)
    axes.plot(offset, mean, color=style.colour, linewidth=1.5, marker=style.marker, markersize=3)


def _rows_of_panels(names: Sequence[str], count: int) -> tuple[Figure, list[Axes]]:
    """Make panels in a row that share their rows, one per name."""
    figure = Figure(figsize=(9.2, 0.9 + 0.26 * max(len(names), 1)), layout="constrained")
    panels = figure.subplots(1, count, sharey=True, squeeze=False)[0]
    for axes in panels:
        bare(axes, grid="x")
        axes.tick_params(axis="y", length=0)
    panels[0].set_yticks(range(len(names)), names, color=INK, fontsize=SMALL, parse_math=False)
    panels[0].set_ylim(len(names) - 0.4, -0.6)
    return figure, list(panels)


def _bar(axes: Axes, row: int, value: Mapping[str, Any] | None, colour: str, *, hatch: str) -> None:
    """Draw a bar with its interval; nothing without a value."""
    if value is None:
        return
    low, high = value["ci95"]
    axes.barh(
        row, value["mean"], height=0.62, color=colour, alpha=0.55, edgecolor=INK, linewidth=0.6,
        hatch=hatch,
    )  # fmt: skip
    axes.plot([low, high], [row, row], color=INK, linewidth=1.6, solid_capstyle="butt")
