"""An inspection summed up: localisation.json, its figures, and a table for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from selfteach.analysis.figures import style
from selfteach.analysis.figures.localisation_figures import (
    aligned_advantage,
    judges,
    mass_by_region,
)
from selfteach.analysis.inspection.inspection_data import Inspection, example, load
from selfteach.analysis.inspection.localisation import localise
from selfteach.analysis.inspection.step_scores import score_steps

FORMAT = 1

LOCALISED = (
    ("mass on error, %", ("mass", "failing"), 1),
    ("concentration", ("concentration",), 1),
    ("collateral, %", ("collateral",), 2),
    ("hits, %", ("hits",), 1),
    ("style leak", ("style_leak",), 2),
)
"""Columns of the first table: title, where the estimate stands, decimals."""
JUDGED = (
    ("AUROC", ("auroc",), 3),
    ("locates, %", ("locates",), 1),
    ("F1, %", ("f1",), 1),
)


def summarise(folder: Path) -> dict[str, Any]:
    """What localisation.json holds, from an inspection's folder. Raises `CheckpointError`."""
    found: Inspection = load(folder)
    return {"format": FORMAT, **localise(found), "step_scores": score_steps(found)}


def draw(folder: Path, localisation: Mapping[str, Any]) -> list[Path]:
    """Save the figures that there is something to show in, as SVG and PNG; their paths."""
    drawn = {}
    if localisation["with_first_error"]:
        drawn["aligned_advantage"] = aligned_advantage(localisation)
        drawn["mass_by_region"] = mass_by_region(localisation)
    if localisation["step_scores"]["contexts"]:
        drawn["judges"] = judges(localisation)
    shown = example(folder)
    if shown is not None:
        drawn["token_advantages"] = style.token_advantages(shown)
    return [path for name, own in drawn.items()
            for path in style.save(own, folder / "figures" / name)]  # fmt: skip


def print_localisation(localisation: Mapping[str, Any], console: Console) -> None:
    """Two tables: where each context acts, and how well it judges steps."""
    counted = localisation
    console.print(
        f"{counted['answers']:,} answers to {counted['problems']:,} problems, "
        f"{counted['with_first_error']:,} with a first error, {counted['without_error']:,} sound; "
        "95 % intervals over problems",
        highlight=False,
    )
    console.print(_table(localisation["contexts"], LOCALISED, "context"))
    scores = localisation["step_scores"]
    if not scores["contexts"]:
        return
    console.print(
        f"as a process reward model, on the {scores['judged']:,} problems that pooling and threshold "
        f"were not chosen on ({scores['choosing']:,} were)",
        highlight=False,
    )
    console.print(_table({**scores["contexts"], **scores["baselines"]}, JUDGED, "step score"))


def _table(
    rows: Mapping[str, Mapping[str, Any]],
    columns: Sequence[tuple[str, tuple[str, ...], int]],
    first: str,
) -> Table:
    table = Table(box=None, padding=(0, 1), header_style="dim", caption=" ")
    pooled = any("pooling" in row for row in rows.values())
    table.add_column(Text(first), no_wrap=True)
    table.add_column(Text("tells"))
    if pooled:
        table.add_column(Text("pooling"))
    for title, _, _ in columns:
        table.add_column(Text(title), justify="right", no_wrap=True)
    for name, row in rows.items():
        cells = [name, row.get("tells", "–"), *([row["pooling"].split(".")[1]] if pooled else [])]
        values = (_cell(_at(row, path), digits) for _, path, digits in columns)
        table.add_row(*(Text(cell) for cell in [*cells, *values]))
    return table


def _at(row: Mapping[str, Any], path: Sequence[str]) -> Mapping[str, Any] | None:
    value: Any = row
    for name in path:
        value = value[name]
    return value


def _cell(value: Mapping[str, Any] | None, digits: int) -> str:
    """An estimate with its interval, or a dash."""
    if value is None:
        return "–"
    low, high = value["ci95"]
    return f"{value['mean']:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
