"""The report's figures: plain matplotlib figures, and a figure as inline SVG.

Built on `Figure` itself, without pyplot: no global state, no windows, nothing to close. An arm
looks the same in every figure, and colour is never alone: dash and marker tell arms apart in black
and white. Colours: Okabe and Ito's palette for colour-blind readers.
"""

from __future__ import annotations

import io
import re
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from selfteach.analysis.wording import (
    Results,
    Setting,
    arms_of,
    difference,
    pairs,
    settings,
    standing,
)

INK = "#1b1c1e"
"""Text and axes; becomes the page's text colour in `svg`."""
ALERT = "#D55E00"
GRID = "#8a8f9855"
SMALL, TINY = 9, 7.5
"""Font sizes, in points."""
LABELLED_TOKENS = 96
"""Up to so many tokens are named under the axis; of longer answers only positions are."""

PNG_DPI = 160

LONGEST_NAME = 14
"""Characters of a token's name under the axis; longer ones are cut there (never in the report)."""

MOST_PAIRS = 24
"""Differences that a forest plot shows all of; the table beside it always has them all."""

Dash = str | tuple[int, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Style:
    """How an arm is drawn."""

    colour: str
    dash: Dash
    marker: str


FIXED = {
    "base": Style(INK, ":", "x"),
    "grpo": Style("#D55E00", "--", "s"),
    "reference": Style("#0072B2", "-.", "^"),
    "step_aligned": Style("#009E73", "-", "o"),
    "aligned_reference": Style("#56B4E9", (0, (5, 1)), "v"),
    "full_repetition": Style("#CC79A7", (0, (3, 1, 1, 1)), "D"),
    "omission": Style("#E69F00", (0, (1, 1)), "P"),
}
SPARE = (
    Style("#CC79A7", (0, (8, 2)), "X"),
    Style("#E69F00", (0, (8, 2, 1, 2)), "*"),
    Style("#56B4E9", (0, (4, 2, 1, 2, 1, 2)), "<"),
    Style("#0072B2", (0, (2, 2)), ">"),
    Style("#009E73", (0, (6, 3, 2, 3)), "p"),
    Style("#D55E00", (0, (10, 3)), "h"),
)


def styles(names: Iterable[str]) -> dict[str, Style]:
    """One style per arm: the known ones' own, the others' in order of appearance."""
    names = list(names)
    spare = cycle(SPARE)
    return {name: FIXED[name] if name in FIXED else next(spare) for name in names}


def learning_curves(results: Results) -> Figure:
    """Validation Avg@k (percent) against training step, one line per arm.

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
    """A_t = log teacher - log student (nats) at each token of one answer, a panel per context.

    Thin lines stand where a step begins, the dashed line where the first wrong step does. Panels
    share one scale. (The paper's per-token figure.)
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
        _mark_steps(axes, example["steps"], example["first_error_token"])
        axes.set_title(name, loc="left", color=INK, fontsize=SMALL, pad=3, parse_math=False)
    _name_tokens(panels[-1, 0], tokens)
    figure.supylabel("advantage, nats per token", color=INK, fontsize=SMALL)
    return figure


def forest(results: Results) -> Figure:
    """Paired differences in Avg@k (points) with 95 % intervals, main setting first.

    A filled marker's interval excludes 0, a hollow one's does not.
    """
    shown = settings(results)
    groups = [(title, setting["paired"], _legible(results, setting)) for title, setting in shown]
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


def _legible(results: Results, setting: Setting) -> list[str]:
    """A setting's pairs; of more than `MOST_PAIRS` those of the headline and those with the base."""
    names = pairs(results, setting)
    if len(names) <= MOST_PAIRS:
        return names
    return [name for name in names if name in results["headline"] or arms_of(name)[1] == "base"]


SVG: Any = {"svg.fonttype": "none", "svg.hashsalt": "selfteach"}
_DRAWING = threading.Lock()
"""matplotlib takes these settings from globals only."""


@contextmanager
def _drawing(style: Any) -> Iterator[None]:
    """matplotlib's global settings, held for one drawing; a glyph it lacks is drawn as a box."""
    with _DRAWING, matplotlib.rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def svg(figure: Figure, name: str = "figure") -> str:
    """A figure as an ``<svg>`` element to stand inside a page; the same figure, the same text.

    Text stays text, the background is left to the page, `INK` becomes ``currentColor``, nothing in it
    refers to anything outside, and all ids begin with ``name``, so that a page may hold several.
    """
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    sink = io.StringIO()
    with _drawing(SVG):
        figure.savefig(sink, format="svg", transparent=True, metadata=nothing)
    figure.set_layout_engine("none")  # laid out once: what is drawn of it later keeps its places
    drawn = sink.getvalue()
    drawn = drawn[drawn.index("<svg") :].strip()
    drawn = re.sub(r' id="[A-Za-z0-9]+_\d+"', "", drawn)  # running numbers that nothing refers to
    drawn = re.sub(r"<!--.*?-->\s*", "", drawn, flags=re.DOTALL)
    drawn = re.sub(r"<[^>]*>", lambda tag: _shorter(tag[0]), drawn)
    drawn = re.sub(r'(?<= id=")(?=\w)|(?<=href="#)|(?<=url\(#)', f"{name}-", drawn)
    return re.sub(INK, "currentColor", drawn, flags=re.IGNORECASE)


def _shorter(tag: str) -> str:
    """A tag with coordinates to a hundredth of a point, on one line, its font left to the page."""
    tag = re.sub(r"(\.\d\d)\d+", r"\1", tag.replace("\n", " "))
    return re.sub(r"font-family: [^;\"]*", "font-family: sans-serif", tag)


def save(figure: Figure, path: Path) -> list[Path]:
    """A figure as ``path`` with .svg and with .png, on white, the same bytes each time; both paths."""
    path.parent.mkdir(parents=True, exist_ok=True)
    vector, pixels = path.with_suffix(".svg"), path.with_suffix(".png")
    with _drawing({**SVG, "svg.fonttype": "path"}):
        figure.savefig(vector, facecolor="white", metadata={"Date": None})
        figure.savefig(pixels, facecolor="white", dpi=PNG_DPI)
    return [vector, pixels]


def visible(token: str) -> str:
    """A token in which white space and control characters can be seen."""
    seen = {ord("\n"): "↵", ord("\t"): "⇥", ord(" "): "␣", 0x7F: "␡"}
    controls = {code: chr(0x2400 + code) for code in range(0x20)}
    return token.translate({**controls, **seen})


def bare(axes: Axes, grid: str = "y") -> None:
    """Two spines, a faint grid, quiet ticks."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK)
    axes.tick_params(colors=INK, labelsize=SMALL, width=0.8, length=3)
    axes.grid(axis=grid, color=GRID, linewidth=0.6)  # type: ignore[arg-type]
    axes.set_axisbelow(True)


def legend(axes: Axes, columns: int = 4) -> None:
    """Above the axes, without a frame; nothing for axes without labels."""
    handles, _ = axes.get_legend_handles_labels()
    if not handles:
        return
    lines = -(-len(handles) // columns)
    shown = axes.legend(
        loc="lower left", bbox_to_anchor=(0, 1), ncols=-(-len(handles) // lines), frameon=False,
        fontsize=SMALL, labelcolor=INK, handlelength=3.4, borderaxespad=0.2,
    )  # fmt: skip
    for text in shown.get_texts():
        text.set_parse_math(False)


def _mark_steps(axes: Axes, steps: Sequence[int], first_error: int | None) -> None:
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
        seen = [visible(token) for token in tokens]
        names = [s if len(s) <= LONGEST_NAME else s[: LONGEST_NAME - 1] + "…" for s in seen]
        turn = 90 if max(map(len, names), default=0) > 2 else 0
        axes.set_xticks(
            range(len(names)), names, color=INK, fontsize=TINY, rotation=turn, parse_math=False
        )
    else:
        axes.set_xlabel("token of the answer", color=INK, fontsize=SMALL)


def _interval(axes: Axes, row: int, value: Mapping[str, Any], style: Style) -> None:
    mean, (low, high) = value["mean"], value["ci95"]
    filled = "none" if standing(value) == "open" else style.colour
    axes.plot([low, high], [row, row], color=style.colour, linewidth=1.8)
    axes.plot(
        [mean], [row], marker=style.marker, markersize=6, color=style.colour,
        markerfacecolor=filled, linestyle="none",
    )  # fmt: skip
    axes.annotate(
        difference(value).replace("-", "−"), (1, row), xycoords=("axes fraction", "data"),
        xytext=(6, 0), textcoords="offset points", va="center", color=INK, fontsize=SMALL,
    )  # fmt: skip
