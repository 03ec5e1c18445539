"""Draw the figures of results.json and of one answer's token advantages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from selfteach.analysis.figures.style import (
    ALERT,
    GRID,
    INK,
    SMALL,
    SPARE,
    TINY,
    ArmStyle,
    bare,
    legend,
    styles,
)
from selfteach.analysis.results_text import (
    Results,
    Setting,
    arms_of,
    decision,
    difference,
    ordered_pairs,
    settings,
)

LABELLED_TOKENS = 96
"""Up to this many tokens are labelled under the axis; longer answers have positions only."""
LONGEST_NAME = 14
"""Characters of a token's name under the axis; longer ones are shortened there."""

MOST_PAIRS = 24
"""Up to this many differences are all in the forest plot; the table beside it always has all."""


def learning_curves(results: Results) -> Figure:
    """Draw validation Avg@k (percent) against training step, one line per arm.

    The line is the mean over seeds, the band reaches from the worst seed to the best. The dotted
    line is the base: the mean of all curves before the first step (absent without that point).
    """
    arms = {name: arm for name, arm in results["arms"].items() if "curve" in arm}
    figure = Figure(figsize=(7.2, 3.6), layout="constrained")
    axes = figure.add_subplot()
    bare(axes)
    look = styles(results["arms"])
    at_start = []
    for name, arm in arms.items():
        steps, style = arm["curve"]["steps"], look[name]
        avg_SE = np.array(list(arm["curve"]["avg"].values()), dtype=float)
        if steps and steps[0] == 0:
            at_start.extend(avg_SE[:, 0])
        axes.plot(
            steps, avg_SE.mean(0), color=style.colour, linestyle=style.dash, marker=style.marker,
            markersize=4.5, linewidth=1.8, label=name,
        )  # fmt: skip
        if len(avg_SE) > 1:
            low, high = avg_SE.min(0), avg_SE.max(0)
            axes.fill_between(steps, low, high, color=style.colour, alpha=0.14, linewidth=0)
    if at_start:
        axes.axhline(
            float(np.mean(at_start)), color=INK, linestyle=":", linewidth=1.6, label="base"
        )
    axes.set_xlabel("training step", color=INK, fontsize=SMALL)
    axes.set_ylabel("Avg@k on validation, %", color=INK, fontsize=SMALL)
    legend(axes)
    return figure


def token_advantages(example: Mapping[str, Any]) -> Figure:
    """Draw A_t = log teacher - log student (nats) at each token of one answer, a panel per context.

    Thin lines are where a step begins, the dashed line where the first wrong step does. Panels
    share one scale. (The paper's figure of per-token advantages.)
    """
    tokens, contexts = example["tokens"], example["contexts"]
    size = (float(np.clip(1.2 + 0.19 * len(tokens), 7.2, 13)), 0.7 + 1.45 * max(len(contexts), 1))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(max(len(contexts), 1), 1, sharex=True, sharey=True, squeeze=False)
    look = styles(contexts)
    for axes, (name, context) in zip(panels[:, 0], contexts.items(), strict=False):
        bare(axes)
        axes.bar(
            range(len(tokens)), context["advantage"], width=0.8, color=look[name].colour, zorder=2
        )
        axes.axhline(0, color=INK, linewidth=0.8, zorder=3)
        _draw_step_borders(axes, example["steps"], example["first_error_token"])
        axes.set_title(name, loc="left", color=INK, fontsize=SMALL, pad=3, parse_math=False)
    _name_tokens(panels[-1, 0], tokens)
    figure.supylabel("advantage, nats per token", color=INK, fontsize=SMALL)
    return figure


def forest(results: Results) -> Figure:
    """Draw paired differences in Avg@k (points) with 95 % intervals, main setting first.

    A filled marker's interval excludes 0 and is over two seeds or more.
    """
    shown = settings(results)
    groups = [
        (title, setting["paired"], _shown_pairs(results, setting)) for title, setting in shown
    ]
    num_rows = sum(len(names) + (len(groups) > 1) for _, _, names in groups)
    figure = Figure(figsize=(7.2, 0.8 + 0.24 * num_rows), layout="constrained")
    axes = figure.add_subplot()
    bare(axes, grid="x")
    axes.axvline(0, color=INK, linewidth=0.9)
    look, labels, heads = styles(results["arms"]), [], []
    for title, paired, names in groups:
        if len(groups) > 1:
            heads.append((len(labels), title))
            labels.append("")
        for pair in names:
            style = look.get(arms_of(pair)[0], SPARE[0])
            _interval(axes, len(labels), paired[pair]["avg"], style)
            labels.append(" − ".join(arms_of(pair)))
    axes.set_yticks(range(len(labels)), labels, color=INK, fontsize=SMALL, parse_math=False)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    for row, title in heads:  # inside the axes: as a tick label a long title would leave no room
        axes.text(
            0.0, row, title, transform=axes.get_yaxis_transform(), va="center", color=INK,
            fontsize=SMALL, fontweight="bold", parse_math=False,
        )  # fmt: skip
    axes.set_xlabel(f"difference in Avg@{results['k']}, points", color=INK, fontsize=SMALL)
    return figure


def _shown_pairs(results: Results, setting: Setting) -> list[str]:
    """Return a setting's pairs; of more than `MOST_PAIRS` the headline's and those with the base."""
    names = ordered_pairs(results, setting)
    if len(names) <= MOST_PAIRS:
        return names
    return [name for name in names if name in results["headline"] or arms_of(name)[1] == "base"]


def visible(token: str) -> str:
    """Return a token with visible symbols for white space and control characters."""
    spaces = {ord("\n"): "↵", ord("\t"): "⇥", ord(" "): "␣", 0x7F: "␡"}
    controls = {code: chr(0x2400 + code) for code in range(0x20)}
    return token.translate({**controls, **spaces})


def _draw_step_borders(axes: Axes, steps: Sequence[int], first_error: int | None) -> None:
    starts = [t for t in range(1, len(steps)) if steps[t] != steps[t - 1]]
    for start in starts:
        axes.axvline(start - 0.5, color=GRID, linewidth=0.9, zorder=1)
    if first_error is not None:
        axes.axvline(first_error - 0.5, color=ALERT, linestyle="--", linewidth=1.3, zorder=4)
        axes.annotate(
            "first error", (first_error - 0.5, 1), xycoords=("data", "axes fraction"),
            xytext=(3, 3), textcoords="offset points", color=INK, fontsize=TINY,
        )  # fmt: skip


def _name_tokens(axes: Axes, tokens: Sequence[str]) -> None:
    axes.set_xlim(-0.8, max(len(tokens), 1) - 0.2)
    if len(tokens) <= LABELLED_TOKENS:
        shown = [visible(token) for token in tokens]
        names = [s if len(s) <= LONGEST_NAME else s[: LONGEST_NAME - 1] + "…" for s in shown]
        rotation = 90 if max(map(len, names), default=0) > 2 else 0
        axes.set_xticks(
            range(len(names)), names, color=INK, fontsize=TINY, rotation=rotation, parse_math=False
        )
    else:
        axes.set_xlabel("token of the answer", color=INK, fontsize=SMALL)


def _interval(axes: Axes, row: int, value: Mapping[str, Any], style: ArmStyle) -> None:
    mean, (low, high) = value["mean"], value["ci95"]
    filled = style.colour if decision(value) in ("higher", "lower") else "none"
    axes.plot([low, high], [row, row], color=style.colour, linewidth=1.8)
    axes.plot(
        [mean], [row], marker=style.marker, markersize=6, color=style.colour,
        markerfacecolor=filled, linestyle="none",
    )  # fmt: skip
    axes.annotate(
        difference(value).replace("-", "−"), (1, row), xycoords=("axes fraction", "data"),
        xytext=(6, 0), textcoords="offset points", va="center", color=INK, fontsize=SMALL,
    )  # fmt: skip
