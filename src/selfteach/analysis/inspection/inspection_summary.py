"""Summarize an inspection: localisation.json, its figures, and tables on the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from rich.text import Text

from selfteach.analysis.figures import style
from selfteach.analysis.figures.localisation_figures import (
    aligned_advantage,
    mass_by_region,
    step_detection,
)
from selfteach.analysis.figures.results_figures import token_advantages
from selfteach.analysis.inspection.inspection_data import example, read_inspection
from selfteach.analysis.inspection.localisation import localise
from selfteach.analysis.inspection.step_scores import score_steps

FORMAT = 1

LOCALISATION_COLUMNS = (
    ("mass on error, %", ("mass", "failing"), 1),
    ("concentration", ("concentration",), 1),
    ("collateral, %", ("collateral",), 2),
    ("hits, %", ("hits",), 1),
    ("style leak", ("style_leak",), 2),
)
"""Columns of the first table: title, path of the estimate in localisation.json, decimals."""
STEP_SCORE_COLUMNS = (
    ("AUROC", ("auroc",), 3),
    ("locates, %", ("locates",), 1),
    ("F1, %", ("f1",), 1),
)


def summarize(folder: str | Path) -> dict[str, Any]:
    """Return localisation.json from an inspection's folder.

    Raises `CheckpointError` if it is missing, unfinished or of another format.
    """
    inspection = read_inspection(Path(folder))
    return {"format": FORMAT, **localise(inspection), "step_scores": score_steps(inspection)}


def save_figures(folder: str | Path, localisation: Mapping[str, Any]) -> list[Path]:
    """Save the figures that have something to show, as SVG and PNG; return their paths."""
    folder = Path(folder)
    figures: dict[str, Figure | None] = {}
    if localisation["with_first_error"]:
        figures["aligned_advantage"] = aligned_advantage(localisation)
        figures["mass_by_region"] = mass_by_region(localisation)
    if localisation["step_scores"]["contexts"]:
        figures["judges"] = step_detection(localisation)
    if (answer := example(folder)) is not None:
        figures["token_advantages"] = token_advantages(answer)
    return [path for name, figure in figures.items() if figure is not None
            for path in style.save(figure, folder / "figures" / name)]  # fmt: skip


def print_localisation(localisation: Mapping[str, Any], console: Console) -> None:
    """Print two tables: where each context acts, and how well it detects wrong steps."""
    console.print(
        f"{localisation['answers']:,} rollouts of {localisation['problems']:,} problems, "
        f"{localisation['with_first_error']:,} with a first error, "
        f"{localisation['without_error']:,} sound; 95 % intervals over problems",
        highlight=False,
    )
    console.print(_table(localisation["contexts"], LOCALISATION_COLUMNS, "context"))
    scores = localisation["step_scores"]
    if not scores["contexts"]:
        return
    console.print(
        f"as a process reward model, on the {scores['judged']:,} held-out problems; pooling and "
        f"threshold were chosen on {scores['choosing']:,} others",
        highlight=False,
    )
    console.print(
        _table({**scores["contexts"], **scores["baselines"]}, STEP_SCORE_COLUMNS, "step score")
    )


def _table(
    rows: Mapping[str, Mapping[str, Any]],
    columns: Sequence[tuple[str, tuple[str, ...], int]],
    first_title: str,
) -> Table:
    table = Table(box=None, padding=(0, 1), header_style="dim", caption=" ")
    pooled = any("pooling" in row for row in rows.values())
    table.add_column(Text(first_title), no_wrap=True)
    table.add_column(Text("reveals"))
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
    """Format an estimate with its interval; a dash without one."""
    if value is None:
        return "–"
    low, high = value["ci95"]
    return f"{value['mean']:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
