"""Style figures, and write them as inline SVG and as files.

Figures are built on matplotlib's `Figure` itself, without pyplot: no global state, no windows,
nothing to close. An arm looks the same in every figure, and dash and marker tell arms apart without
colour. Colours are those of `palette`.
"""

from __future__ import annotations

import io
import re
import threading
import unicodedata
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.ticker import MaxNLocator

from selfteach.analysis.figures.palette import PALETTE

INK = "#1b1c1e"
"""Text and axes; becomes the page's text colour in `svg`."""
ALERT = "#a84301"
"""Thresholds and first errors, no arm's colour; becomes the page's colour of warnings in `svg`."""
GRID = "#8a8f9855"
SMALL, TINY = 9, 7.5
"""Font sizes, in points."""
PNG_DPI = 160
PHONE_WIDTH = 3.75
"""Inches: a figure of this width fits a phone's page without being made smaller."""
LONGEST_NAME = 44
"""Characters of an arm's name in a figure; tables have the whole name."""

Dash = str | tuple[int, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class ArmStyle:
    """Describes how an arm is drawn."""

    colour: str
    dash: Dash
    marker: str


DASHES: tuple[Dash, ...] = (
    "-", "--", "-.", (0, (1, 1)), (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (8, 2)), (0, (8, 2, 1, 2)),
    (0, (4, 2, 1, 2, 1, 2)), (0, (2, 2)), (0, (6, 3, 2, 3)),
)  # fmt: skip
MARKERS = ("o", "^", "s", "v", "D", "P", "X", "*", "<", ">", "p", "h", "d", "8", "H")
NAMES = (
    "step_aligned", "reference", "grpo", "aligned_reference", "full_repetition", "omission",
    "holistic", "answer_only", "shuffled_lines", "other_answer", "other_reference", "peer",
    "environment", "partly_aligned", "none",
)  # fmt: skip
"""Arms of the paper and contexts of this package: each always has the same colour."""


def _style(number: int) -> ArmStyle:
    """Return the style of a number; the first 165 differ, the first 20 in their colour too."""
    dash, marker = DASHES[number % len(DASHES)], MARKERS[number % len(MARKERS)]
    return ArmStyle(PALETTE[number % len(PALETTE)].light, dash, marker)


FIXED = {
    "base": ArmStyle(INK, ":", "x"),
    **{name: _style(number) for number, name in enumerate(NAMES)},
}
SPARE = tuple(_style(number) for number in range(len(NAMES), len(PALETTE)))
"""Styles of names that are not in `NAMES`."""


def styles(names: Iterable[str]) -> dict[str, ArmStyle]:
    """Return one style per arm or context, by name.

    `NAMES` have fixed ones. Others take `SPARE` in order of appearance, then those of `NAMES` that do
    not appear, and more than that share colours but neither dash nor marker with one another.
    """
    names = list(dict.fromkeys(names))
    free = iter([*SPARE, *(FIXED[name] for name in NAMES if name not in names)])
    more = iter(map(_style, count(len(PALETTE))))
    return {
        name: FIXED[name] if name in FIXED else next(free, None) or next(more) for name in names
    }


SVG: Any = {"svg.fonttype": "none", "svg.hashsalt": "selfteach"}
_DRAWING = threading.Lock()
"""matplotlib takes these settings from globals only."""


@contextmanager
def _drawing(style: Any) -> Iterator[None]:
    """Hold matplotlib's global settings for one drawing; a missing glyph is drawn as a box."""
    with _DRAWING, matplotlib.rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def svg(figure: Figure, name: str = "figure") -> str:
    """Return a figure as an ``<svg>`` element for a page; the same figure gives the same text.

    Text stays text, the background is left to the page, colours become those of the page's theme
    (``currentColor`` for `INK`), nothing in it refers to anything outside but these, and all ids begin
    with ``name``, so that a page may hold several.
    """
    no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    sink = io.StringIO()
    with _drawing(SVG):
        figure.savefig(sink, format="svg", transparent=True, metadata=no_metadata)
    figure.set_layout_engine("none")  # a later drawing keeps this layout
    drawn = sink.getvalue()
    drawn = drawn[drawn.index("<svg") :].strip()
    drawn = re.sub(r' id="[A-Za-z0-9]+_\d+"', "", drawn)  # running numbers without references
    drawn = re.sub(r"<!--.*?-->\s*", "", drawn, flags=re.DOTALL)
    drawn = re.sub(r"<[^>]*>", lambda tag: _shorter(tag[0]), drawn)
    drawn = re.sub(r'(?<= id=")(?=\w)|(?<=href="#)|(?<=url\(#)', f"{name}-", drawn)
    return _COLOURS.sub(lambda colour: _THEMED[colour[0].lower()], drawn)


_THEMED = {
    INK: "currentColor",
    ALERT: "var(--alert)",
    **{colour.light: f"var(--series-{number})" for number, colour in enumerate(PALETTE)},
}
_COLOURS = re.compile("|".join(_THEMED), re.IGNORECASE)


def theme_colours() -> str:
    """Return the style sheet's rule for the colours of `svg`, in light and in dark."""
    values = (f"--series-{i}: light-dark({c.light}, {c.dark});" for i, c in enumerate(PALETTE))
    return f":root {{ {' '.join(values)} }}"


def _shorter(tag: str) -> str:
    """Round a tag's coordinates to 0.01 points, put it on one line, leave its font to the page."""
    tag = re.sub(r"(\.\d\d)\d+", r"\1", tag.replace("\n", " "))
    return re.sub(r"font-family: [^;\"]*", "font-family: sans-serif", tag)


def save(figure: Figure, path: Path) -> list[Path]:
    """Save a figure as ``path`` with .svg and .png, on white; return both paths.

    The same figure gives the same bytes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    vector, pixels = path.with_suffix(".svg"), path.with_suffix(".png")
    with _drawing({**SVG, "svg.fonttype": "path"}):
        figure.savefig(vector, facecolor="white", metadata={"Date": None})
        figure.savefig(pixels, facecolor="white", dpi=PNG_DPI)
    return [vector, pixels]


def bare(axes: Axes, grid: str = "y") -> None:
    """Style axes: two spines, a faint grid, small ticks."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK)
    axes.tick_params(colors=INK, labelsize=SMALL, width=0.8, length=3)
    axes.grid(axis=grid, color=GRID, linewidth=0.6)  # type: ignore[arg-type]
    axes.set_axisbelow(True)


def step_axis(axes: Axes, label: str) -> None:
    """Label an x axis of counted things: whole numbers only, and room around a single point."""
    axes.set_xlabel(label, color=INK, fontsize=SMALL)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
    low, high = axes.get_xlim()
    if high - low < 1:
        middle = round((low + high) / 2)
        axes.set_xlim(middle - 1, middle + 1)
        axes.set_xticks([middle])


def shortened(name: str, most: int = LONGEST_NAME) -> str:
    """Return a name of at most ``most`` characters, with its middle left out where it is longer."""
    if len(name) <= most:
        return name
    head = (most - 1) // 2
    return f"{name[:head]}…{name[len(name) - (most - 1 - head) :]}"


def text_width(text: str, size: float = SMALL) -> float:
    """Return about how wide a text is, in inches; wide letters (Chinese, …) count twice."""
    letters = sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)
    return 0.6 * size / 72 * letters


def legend(axes: Axes, columns: int = 4) -> None:
    """Add a legend above the axes, without a frame; none for axes without labels.

    It has as many columns, ``columns`` at most, as there is room for; see `figure_legend`.
    """
    figure = axes.get_figure(root=True)
    assert figure is not None
    if len(figure.axes) == 1:
        figure_legend(figure, axes, columns)
        return
    grid = axes.get_subplotspec()
    shown = _legend(
        axes, axes, columns, figure.get_figwidth() / (grid.get_gridspec().ncols if grid else 1)
    )
    if shown is not None:
        shown.set_bbox_to_anchor((0, 1))


def figure_legend(figure: Figure, axes: Axes, columns: int = 4) -> None:
    """Add the legend of some axes above the figure's panels; the figure grows by its height."""
    _legend(figure, axes, columns, figure.get_figwidth())


def _legend(parent: Figure | Axes, axes: Axes, columns: int, width: float) -> Legend | None:
    handles, labels = axes.get_legend_handles_labels()
    if not handles:
        return None
    handle = 0.8
    most = min(LONGEST_NAME, int((width - handle) / text_width("x")))
    labels = [shortened(label, most) for label in labels]
    entry = max(map(text_width, labels)) + handle
    lines = -(-len(handles) // max(1, min(columns, int(width / entry))))
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.set_figheight(figure.get_figheight() + 0.19 * (lines - 1))
    shown = parent.legend(
        handles, labels, loc="outside upper left" if parent is figure else "lower left",
        ncols=-(-len(handles) // lines), frameon=False, fontsize=SMALL, labelcolor=INK,
        handlelength=3.4, borderaxespad=0.2,
    )  # fmt: skip
    for text in shown.get_texts():
        text.set_parse_math(False)
    return shown
