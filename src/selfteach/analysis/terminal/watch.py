"""A look at runs while they go on, from metrics.jsonl alone: how far, how long still, how well."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from selfteach.analysis.run_data import Run, read_json, read_runs

RECENT = 10
"""Rows that the time left is reckoned from: the pace of now, not of the start."""
QUIET_AFTER_S = 120.0
"""A run that has written nothing for so long, and for three of its steps, is said to be quiet."""
COLUMNS = ("run", "step", "left", "right", "length", "loss", "fidelity", "dropped", "Avg@k")
"""Shares of the last step, length in tokens, and the last validation's Avg@k in percent."""


@dataclass(frozen=True, slots=True)
class Look:
    """What a run has come to by now; None where it has not said."""

    name: str
    step: int
    steps: int
    state: str
    """``done``, ``running``, ``waiting`` (not begun) or ``quiet`` (nothing written for long)."""
    seconds_left: float | None
    last: Mapping[str, Any]
    """Its last training row."""
    validation: Mapping[str, Any] | None
    """Its last validation row."""


def watch(
    folder: Path, console: Console, *, once: bool = False, every: float = 2.0,
    sleep: Callable[[float], None] = time.sleep,
) -> None:  # fmt: skip
    """Show a study's or a run's table until all its runs are complete; with ``once``, a single time.

    Where the output is no terminal, a single time too: a file is no place to redraw. Raises
    `CheckpointError` if the folder holds neither.
    """
    found = looks(folder)
    if once or not console.is_terminal:
        console.print(_table(folder, found))
        return
    with Live(_table(folder, found), console=console, auto_refresh=False) as live:
        while not all(look.state == "done" for look in found):
            sleep(every)
            found = looks(folder)
            live.update(_table(folder, found), refresh=True)


def looks(folder: Path, now: float | None = None) -> list[Look]:
    """Every run of a study, those that have not begun too, or the one run that a folder is."""
    begun = {run.folder: run for run in read_runs(folder)}
    planned = dict.fromkeys([*_planned(folder), *begun])
    now = time.time() if now is None else now
    return [
        _look(begun[path], _name(path, folder), now)
        if path in begun
        else Look(_name(path, folder), 0, 0, "waiting", None, {}, None)
        for path in planned
    ]


def _look(run: Run, name: str, now: float) -> Look:
    trained, validations = run.of_kind("step"), run.of_kind("validation")
    step = trained[-1]["step"] if trained else 0
    if run.is_complete:
        state, left = "done", 0.0
    else:
        left = _seconds_left(run, step)
        state = "quiet" if _is_quiet(run, now) else "running"
    last = trained[-1] if trained else {}
    return Look(name, step, run.steps, state, left, last, validations[-1] if validations else None)


def _seconds_left(run: Run, step: int) -> float | None:
    """Recent seconds per step and per evaluation, times what is left of each; None before a step.

    The test evaluation at the end is not reckoned.
    """
    trained, scored = run.of_kind("step")[-RECENT:], run.of_kind("validation")[-RECENT:]
    if not trained:
        return None
    per_step = sum(map(_seconds, trained)) / len(trained)
    per_score = sum(map(_seconds, scored)) / len(scored) if scored else 0.0
    every = run.config["evaluation"]["every"]
    return (run.steps - step) * (per_step + per_score / every)


def _is_quiet(run: Run, now: float) -> bool:
    path = run.folder / "metrics.jsonl"
    if not path.exists():
        return False
    slowest = max((_seconds(row) for row in run.rows[-RECENT:]), default=0.0)
    return now - path.stat().st_mtime > max(QUIET_AFTER_S, 3 * slowest)


def _seconds(row: Mapping[str, Any]) -> float:
    return sum(value for key, value in row.items() if key.startswith("time/"))


def _planned(folder: Path) -> Iterator[Path]:
    """Folders of all runs of a study, in the order in which they are begun; none for a run."""
    if not (folder / "study.json").exists():
        return
    saved = read_json(folder / "study.json")
    if saved.get("kind") != "study":  # a sweep has rates besides: what has begun is shown
        return
    study = saved["study"]
    settings = [("runs", study["study"]["seeds"], list(study["arms"]))]
    for name, variant in study["variants"].items():
        arms = variant["arms"] or list(study["arms"])
        settings.append((f"variants/{name}", variant["seeds"], arms))
    for root, seeds, arms in settings:
        for seed in seeds:
            for arm in ("base", *arms):
                yield folder / root / arm / f"seed_{seed}"


def _name(path: Path, folder: Path) -> str:
    """``grpo 0`` of the main setting's seed 0, ``easy grpo 0`` of a variant's."""
    if path == folder:
        return folder.resolve().name
    *inside, seed = path.relative_to(folder).parts
    shown = [part for part in inside if part not in ("runs", "variants")]
    return " ".join([*shown, seed.removeprefix("seed_")])


def _table(folder: Path, found: list[Look]) -> Group:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    for i, title in enumerate(COLUMNS):
        table.add_column(Text(title), justify="right" if i else "left", no_wrap=True)
    for look in found:
        style = {"waiting": "dim", "quiet": "yellow"}.get(look.state, "")
        table.add_row(*(Text(cell) for cell in _cells(look)), style=style)
    done = sum(look.state == "done" for look in found)
    head = Text(f"{done} of {len(found)} runs complete: {folder}", style="bold", no_wrap=True)
    return Group(head, table)


def _cells(look: Look) -> list[str]:
    last, scored = look.last, look.validation
    left = look.state if look.state != "running" else _clock(look.seconds_left)
    return [
        look.name,
        f"{look.step}/{look.steps}" if look.steps else "–",
        left,
        _shown(last, "correct", "{:.0%}"),
        _shown(last, "length", "{:.0f}"),
        _shown(last, "loss", "{:.3f}"),
        _shown(last, "fidelity", "{:.2f}"),
        _shown(last, "dropped", "{:.0%}"),
        f"{scored['avg']:.1f}" if scored else "–",
    ]


def _shown(row: Mapping[str, Any], key: str, form: str) -> str:
    return form.format(row[key]) if key in row else "–"


def _clock(seconds: float | None) -> str:
    """``1:05:20`` or ``3:07``; a dash where nobody knows."""
    if seconds is None:
        return "–"
    hours, rest = divmod(round(seconds), 3600)
    minutes, rest = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
