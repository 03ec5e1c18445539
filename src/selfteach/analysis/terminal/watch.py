"""Show runs while they go on, from metrics.jsonl alone: progress, time left, and last metrics."""

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

from selfteach.analysis.run_data import RunData, read_json, read_runs
from selfteach.runtime.stored_files import reading

RECENT = 10
"""Rows that the time left is computed from: the current pace, not that of the start."""
QUIET_AFTER_S = 120.0
"""A run that has written nothing for this long, and for three of its steps, is shown as quiet."""
COLUMNS = ("run", "step", "left", "right", "length", "loss", "fidelity", "dropped", "Avg@k")
"""Shares of the last step, length in tokens, and the last validation's Avg@k in percent."""


@dataclass(frozen=True, slots=True)
class RunStatus:
    """Describes how far a run is and its last metrics; None where it has logged none yet."""

    name: str
    step: int
    steps: int
    state: str
    """``done``, ``running``, ``waiting`` (not started) or ``quiet`` (nothing written for long)."""
    seconds_left: float | None
    last: Mapping[str, Any]
    """The last row of a training step."""
    validation: Mapping[str, Any] | None
    """The last validation row."""


def watch(
    folder: Path, console: Console, *, once: bool = False, every: float = 2.0,
    sleep: Callable[[float], None] = time.sleep,
) -> None:  # fmt: skip
    """Show a study's or a run's table until all its runs are complete; with ``once``, a single time.

    Where the output is not a terminal, also a single time: a file cannot be redrawn. Raises
    `CheckpointError` if the folder holds neither.
    """
    statuses = run_statuses(folder)
    if once or not console.is_terminal:
        console.print(_table(folder, statuses))
        return
    with Live(_table(folder, statuses), console=console, auto_refresh=False) as live:
        while not all(status.state == "done" for status in statuses):
            sleep(every)
            statuses = run_statuses(folder)
            live.update(_table(folder, statuses), refresh=True)


def run_statuses(folder: Path, now: float | None = None) -> list[RunStatus]:
    """Return the status of every run of a study, also of those not started, or of the one run."""
    started = {run.folder: run for run in read_runs(folder)}
    planned = dict.fromkeys([*_planned(folder), *started])
    now = time.time() if now is None else now
    return [
        _status(started[path], _name(path, folder), now)
        if path in started
        else RunStatus(_name(path, folder), 0, 0, "waiting", None, {}, None)
        for path in planned
    ]


def _status(run: RunData, name: str, now: float) -> RunStatus:
    trained, validations = run.of_kind("step"), run.of_kind("validation")
    step = trained[-1]["step"] if trained else 0
    if run.is_complete:
        state, left = "done", 0.0
    else:
        left = _seconds_left(run, step)
        state = "quiet" if _is_quiet(run, now) else "running"
    last = trained[-1] if trained else {}
    validation = validations[-1] if validations else None
    return RunStatus(name, step, run.steps, state, left, last, validation)


def _seconds_left(run: RunData, step: int) -> float | None:
    """Estimate the time left from recent seconds per step and per evaluation; None before a step.

    The test evaluation at the end is not included.
    """
    trained, evaluated = run.of_kind("step")[-RECENT:], run.of_kind("validation")[-RECENT:]
    if not trained:
        return None
    per_step = sum(map(_seconds, trained)) / len(trained)
    per_evaluation = sum(map(_seconds, evaluated)) / len(evaluated) if evaluated else 0.0
    every = run.config["evaluation"]["every"]
    return (run.steps - step) * (per_step + per_evaluation / every)


def _is_quiet(run: RunData, now: float) -> bool:
    path = run.folder / "metrics.jsonl"
    if not path.exists():
        return False
    slowest = max((_seconds(row) for row in run.rows[-RECENT:]), default=0.0)
    return now - path.stat().st_mtime > max(QUIET_AFTER_S, 3 * slowest)


def _seconds(row: Mapping[str, Any]) -> float:
    return sum(value for key, value in row.items() if key.startswith("time/"))


def _planned(folder: Path) -> Iterator[Path]:
    """Yield the folders of all runs of a study, in the order in which they start; none for a run."""
    if not (folder / "study.json").exists():
        return
    path = folder / "study.json"
    saved = read_json(path)
    if saved.get("kind") != "study":  # a sweep has rates besides: only started runs are shown
        return
    with reading(path):
        yield from _planned_in(saved["study"], folder)


def _planned_in(study: Mapping[str, Any], folder: Path) -> Iterator[Path]:
    settings = [("runs", study["study"]["seeds"], list(study["arms"]))]
    for name, variant in study["variants"].items():
        arms = variant["arms"] or list(study["arms"])
        settings.append((f"variants/{name}", variant["seeds"], arms))
    for root, seeds, arms in settings:
        for seed in seeds:
            for arm in ("base", *arms):
                yield folder / root / arm / f"seed_{seed}"


def _name(path: Path, folder: Path) -> str:
    """Return ``grpo 0`` for the main setting's seed 0, ``easy grpo 0`` for a variant's."""
    if path == folder:
        return folder.resolve().name
    *parents, seed = path.relative_to(folder).parts
    names = [name for name in parents if name not in ("runs", "variants")]
    return " ".join([*names, seed.removeprefix("seed_")])


def _table(folder: Path, statuses: list[RunStatus]) -> Group:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    for i, title in enumerate(COLUMNS):
        table.add_column(Text(title), justify="right" if i else "left", no_wrap=True)
    for status in statuses:
        style = {"waiting": "dim", "quiet": "yellow"}.get(status.state, "")
        table.add_row(*(Text(cell) for cell in _cells(status)), style=style)
    done = sum(status.state == "done" for status in statuses)
    head = Text(f"{done} of {len(statuses)} runs complete: {folder}", style="bold", no_wrap=True)
    return Group(head, table)


def _cells(status: RunStatus) -> list[str]:
    last, validation = status.last, status.validation
    left = status.state if status.state != "running" else _clock(status.seconds_left)
    return [
        status.name,
        f"{status.step}/{status.steps}" if status.steps else "–",
        left,
        _formatted(last, "correct", "{:.0%}"),
        _formatted(last, "length", "{:.0f}"),
        _formatted(last, "loss", "{:.3f}"),
        _formatted(last, "fidelity", "{:.2f}"),
        _formatted(last, "dropped", "{:.0%}"),
        f"{validation['avg']:.1f}" if validation else "–",
    ]


def _formatted(row: Mapping[str, Any], key: str, format_spec: str) -> str:
    return format_spec.format(row[key]) if key in row else "–"


def _clock(seconds: float | None) -> str:
    """Return ``1:05:20`` or ``3:07``; a dash where it is unknown."""
    if seconds is None:
        return "–"
    hours, rest = divmod(round(seconds), 3600)
    minutes, rest = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
