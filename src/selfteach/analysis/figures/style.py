"""Style figures, and write them as inline SVG and as files.

Figures are built on matplotlib's `Figure` itself, without pyplot: no global state, no windows,
nothing to close. An arm looks the same in every figure, and dash and marker tell arms apart without
colour. Colours: Okabe and Ito's palette for colour-blind readers.
"""

from __future__ import annotations

import io
import re
import threading
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK = "#1b1c1e"
"""Text and axes; becomes the page's text colour in `svg`."""
ALERT = "#D55E00"
GRID = "#8a8f9855"
SMALL, TINY = 9, 7.5
"""Font sizes, in points."""
PNG_DPI = 160

Dash = str | tuple[int, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class ArmStyle:
    """Describes how an arm is drawn."""

    colour: str
    dash: Dash
    marker: str


FIXED = {
    "base": ArmStyle(INK, ":", "x"),
    "grpo": ArmStyle("#D55E00", "--", "s"),
    "reference": ArmStyle("#0072B2", "-.", "^"),
    "step_aligned": ArmStyle("#009E73", "-", "o"),
    "aligned_reference": ArmStyle("#56B4E9", (0, (5, 1)), "v"),
    "full_repetition": ArmStyle("#CC79A7", (0, (3, 1, 1, 1)), "D"),
    "omission": ArmStyle("#E69F00", (0, (1, 1)), "P"),
}
SPARE = (
    ArmStyle("#CC79A7", (0, (8, 2)), "X"),
    ArmStyle("#E69F00", (0, (8, 2, 1, 2)), "*"),
    ArmStyle("#56B4E9", (0, (4, 2, 1, 2, 1, 2)), "<"),
    ArmStyle("#0072B2", (0, (2, 2)), ">"),
    ArmStyle("#009E73", (0, (6, 3, 2, 3)), "p"),
    ArmStyle("#D55E00", (0, (10, 3)), "h"),
)


def styles(names: Iterable[str]) -> dict[str, ArmStyle]:
    """Return one style per arm: fixed ones for the arms of the paper, others in order of appearance."""
    names = list(names)
    spare = cycle(SPARE)
    return {name: FIXED[name] if name in FIXED else next(spare) for name in names}


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

    Text stays text, the background is left to the page, `INK` becomes ``currentColor``, nothing in it
    refers to anything outside, and all ids begin with ``name``, so that a page may hold several.
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
    return re.sub(INK, "currentColor", drawn, flags=re.IGNORECASE)


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


def legend(axes: Axes, columns: int = 4) -> None:
    """Add a legend above the axes, without a frame; none for axes without labels."""
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
