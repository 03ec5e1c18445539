"""Draw the figures of results.json and of one answer's token advantages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from textwrap import wrap
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from selfteach.analysis.figures.style import (
    ALERT,
    GRID,
    INK,
    PHONE_WIDTH,
    SMALL,
    SPARE,
    TINY,
    ArmStyle,
    bare,
    legend,
    shortened,
    step_axis,
    styles,
    text_width,
)
from selfteach.analysis.results_text import (
    Estimate,
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

LONGEST_ARM, LONGEST_ON_PHONE = 26, 17
"""Characters of an arm's name beside an interval; the table has the whole name."""
MOST_PAIRS = 24
"""Up to this many differences are all in the forest plot; the table beside it always has all."""


def learning_curves(results: Results, *, phone: bool = False) -> Figure:
    """Draw validation Avg@k (percent) against training step, one line per arm.

    The line is the mean over seeds, the band reaches from the worst seed to the best. The dotted
    line is the base: the mean of all curves before the first step (absent without that point).
    """
    arms = {name: arm for name, arm in results["arms"].items() if "curve" in arm}
    figure = Figure(figsize=(PHONE_WIDTH, 3.2) if phone else (7.2, 3.6), layout="constrained")
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
    step_axis(axes, "training step")
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


def forest(results: Results, *, phone: bool = False) -> Figure:
    """Draw paired differences in Avg@k (points) with 95 % intervals, main setting first.

    A filled marker's interval excludes 0 and is over two seeds or more. Each setting has a panel, with
    its title above it. On a phone names and numbers stand above their intervals.
    """
    groups = [
        (title, setting["paired"], _shown_pairs(results, setting))
        for title, setting in settings(results)
    ]
    groups = [group for group in groups if group[2]]
    width, per_row = (PHONE_WIDTH, 0.42) if phone else (7.2, 0.24)
    heights = [per_row * len(names) + 0.1 for _, _, names in groups]
    named = [_pair_name(pair, LONGEST_ARM) for _, _, names in groups for pair in names]
    left = 0.0 if phone else max(map(text_width, named))
    titles = [_lines(title, width - left - 0.4) for title, _, _ in groups if len(groups) > 1]
    above = sum(0.17 * len(lines) + 0.15 for lines in titles)
    figure = Figure(figsize=(width, 0.6 + sum(heights) + above), layout="constrained")
    panels = figure.subplots(
        len(groups), 1, sharex=True, squeeze=False, height_ratios=heights
    )[:, 0]  # fmt: skip
    look = styles(results["arms"])
    for number, (axes, (_, paired, names)) in enumerate(zip(panels, groups, strict=True)):
        bare(axes, grid="x")
        if titles:
            axes.set_title(
                "\n".join(titles[number]), loc="left", color=INK, fontsize=SMALL, x=0,
                fontweight="bold", parse_math=False,
            )  # fmt: skip
        arms = [look.get(arms_of(pair)[0], SPARE[0]) for pair in names]
        values = [paired[pair]["avg"] for pair in names]
        (_phone_rows if phone else _rows)(axes, names, values, arms)
    panels[-1].set_xlabel(f"difference in Avg@{results['k']}, points", color=INK, fontsize=SMALL)
    return figure


def _lines(title: str, width: float) -> list[str]:
    """Break a title into lines of at most so many inches."""
    return wrap(title, max(12, int(width / text_width("x", 1.1 * SMALL)))) or [""]


def _rows(
    axes: Axes, names: Sequence[str], values: Sequence[Estimate], arms: Sequence[ArmStyle]
) -> None:
    """Draw a panel's intervals, names to the left of them and numbers to the right."""
    axes.axvline(0, color=INK, linewidth=0.9)
    for row, (value, style) in enumerate(zip(values, arms, strict=True)):
        _interval(axes, row, value, style)
        axes.annotate(
            _numbers(value), (1, row), xycoords=("axes fraction", "data"), xytext=(6, 0),
            textcoords="offset points", va="center", color=INK, fontsize=SMALL,
        )  # fmt: skip
    labels = [_pair_name(pair, LONGEST_ARM) for pair in names]
    axes.set_yticks(range(len(labels)), labels, color=INK, fontsize=SMALL, parse_math=False)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)


def _phone_rows(
    axes: Axes, names: Sequence[str], values: Sequence[Estimate], arms: Sequence[ArmStyle]
) -> None:
    """Draw a panel's intervals, each below its name and its numbers; the zero line leaves them free."""
    axes.grid(visible=False)
    for row, (pair, value, style) in enumerate(zip(names, values, arms, strict=True)):
        axes.plot([0, 0], [row - 0.16, row + 0.3], color=INK, linewidth=0.9)
        _interval(axes, row, value, style)
        for text, x, side in (
            (_pair_name(pair, LONGEST_ON_PHONE), 0, "left"),
            (_numbers(value), 1, "right"),
        ):
            axes.text(
                x, row - 0.38, text, transform=axes.get_yaxis_transform(), ha=side, va="center",
                color=INK, fontsize=TINY + 0.5, parse_math=False,
            )  # fmt: skip
    axes.spines["left"].set_visible(False)
    axes.set_yticks([])
    axes.set_ylim(len(names) - 0.5, -0.7)


def _pair_name(pair: str, most: int) -> str:
    """Return the two arms of a pair as a subtraction, each name with at most ``most`` characters."""
    return " − ".join(shortened(arm, most) for arm in arms_of(pair))


def _numbers(value: Estimate) -> str:
    return difference(value).replace("-", "−")


def _shown_pairs(results: Results, setting: Setting) -> list[str]:
    """Return a setting's pairs; of more than `MOST_PAIRS` the headline's and those with the base.

    Without a base: those with the first arm.
    """
    names = ordered_pairs(results, setting)
    if len(names) <= MOST_PAIRS:
        return names
    arms = results["arms"]
    anchor = "base" if "base" in arms else next(iter(arms))
    named = [name for name in names if name in results["headline"] or anchor in arms_of(name)]
    return named or names[:MOST_PAIRS]


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
