"""Show progress bars with the time left and the main metrics, read from run folders."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from selfteach.analysis.terminal.sanitize import sanitized
from selfteach.commands.findings import Findings, findings_of
from selfteach.commands.study.jobs import Job
from selfteach.config.recipe import Recipe
from selfteach.runtime.run_folder import RunFolder

if TYPE_CHECKING:
    from selfteach.commands.select.selection import SelectionProgress

SHOWN_METRICS = {
    "correct": ("correct", "{:.0%}"),
    "reward": ("reward", "{:.3g}"),
    "length": ("length", "{:.0f}"),
    "loss": ("loss", "{:.3f}"),
    "fidelity": ("fidelity", "{:.2f}"),
    "dropped": ("dropped", "{:.0%}"),
    "truncated": ("truncated", "{:.0%}"),
}
"""Metrics shown beside a bar: title and number format."""
HIDDEN_IF_ZERO = ("dropped", "truncated")
"""Metrics that are shown only when they are above 0."""
LOG_EVERY = 30.0
"""Seconds between two lines about one bar where there is no terminal."""
SILENT_FOR = 45.0
"""Seconds without a line after which there is one though nothing has changed: a model is being built,
or a batch takes minutes."""
POLL_S = 1.0

SPEED_PERIOD = 600.0
"""Seconds of progress from which the time left is estimated: a step of a real model takes minutes."""


class Bars(Progress):
    """Shows bars in a terminal; in a log file, a line about the first of them from time to time."""

    writes_lines = True
    """In a log file updates are lines; else only what `line` is given, and silence."""

    def __init__(self, *columns: Any, **options: Any) -> None:
        super().__init__(*columns, **options)
        self._logged_at, self._ended = self.get_time(), Event()

    def start(self) -> None:
        """Show the bars; in a log file, say after a while without a line that this goes on."""
        super().start()
        if self.disable:
            self._ended.clear()
            Thread(target=self._log_silence, name="progress", daemon=True).start()

    def stop(self) -> None:
        """Show the bars no more."""
        self._ended.set()
        super().stop()

    def line(self, text: str) -> None:
        """Print a line."""
        self._logged_at = self.get_time()
        self.console.print(text, highlight=False, soft_wrap=True)

    def _log_silence(self) -> None:
        while not self._ended.wait(POLL_S):
            if self.tasks and self.get_time() - self._logged_at >= SILENT_FOR:
                self.line(_log_line(self.tasks[0]))

    def update(self, task_id: TaskID, **fields: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update a bar."""
        super().update(task_id, **fields)
        lines = self.disable and self.writes_lines
        if lines and task_id == self.task_ids[0] and self.is_due:
            self.line(_log_line(self.tasks[0]))

    @property
    def is_due(self) -> bool:
        """Return True if an update would be shown: in a log file not before its next line."""
        return not self.disable or self.get_time() - self._logged_at >= LOG_EVERY


@contextmanager
def run_progress(
    recipe: Recipe, findings: Findings
) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Show a bar for one run; yields a function that takes each row of metrics.

    What the rows say about the run's health is printed when it first shows.
    """
    console = Console(stderr=True)
    with _bars(console) as bars:
        bars.writes_lines = False  # a log file gets a line per step
        task = bars.add_task("training", total=recipe.train.steps, note="")
        rows: dict[str, Mapping[str, Any]] = {}

        def show(row: Mapping[str, Any]) -> None:
            rows[row["kind"]] = row
            if row["kind"] == "step":
                if bars.disable:  # a log file gets a line per step
                    bars.line(
                        f"step {row['step']:>4} of {recipe.train.steps}  {note({'step': row})}"
                    )
                bars.update(task, completed=row["step"], note=note(rows))
                for line in findings.new(row):
                    print_finding(console, line)
            else:
                bars.line(
                    f"step {row['step']:>4}  {row['kind']:<10}  Avg@{row['k']} {row['avg']:.1f} %"
                )

        yield show


def print_finding(console: Console, line: str) -> None:
    """Print a line about a run's health."""
    text = Text(f"health: {sanitized(line)}", style="yellow")
    console.print(text, highlight=False, soft_wrap=True)


@contextmanager
def critique_progress() -> Iterator[Callable[[int, int], None]]:
    """Show a bar over rollouts being critiqued; yields a function that takes (done, total)."""
    with _bars(Console(stderr=True)) as bars:
        task = bars.add_task("critiquing", total=None, note="")
        yield lambda done, total: bars.update(task, completed=done, total=total)


@contextmanager
def selection_progress() -> Iterator[Callable[[SelectionProgress], None]]:
    """Show a bar for a selection; yields a function that takes its progress."""
    with _bars(Console(stderr=True)) as bars:
        task = bars.add_task("selecting", total=None, note="")

        def show(progress: SelectionProgress) -> None:
            note = f"selected {progress.selected:,}"
            bars.update(task, completed=progress.done, total=progress.total, note=note)

        yield show


@contextmanager
def study_progress(jobs: Sequence[Job]) -> Iterator[Callable[[Sequence[Job]], None]]:
    """Show a bar for the study and one per arm; yields a function that reads the run folders.

    Each run that ends meanwhile is printed in a line, so that a log file shows it too.
    """
    console = Console(stderr=True)
    training = [job for job in jobs if job.recipe.train.steps > 0]
    labels = list(dict.fromkeys(job.label for job in training))
    done = {job.folder: _steps_done(job) for job in training}
    findings = {
        job.folder: findings_of(job.recipe, job.folder, RunFolder(job.folder).metrics())
        for job in training
    }
    read = {job.folder: len(RunFolder(job.folder).metrics()) for job in training}
    announced = {job.folder for job in jobs if RunFolder(job.folder).is_complete}

    def steps(label: str | None) -> tuple[int, int]:
        selected = [job for job in training if label in (None, job.label)]
        total = sum(job.recipe.train.steps for job in selected)
        return sum(done[job.folder] for job in selected), total

    with _bars(console) as bars:
        tasks = {}
        for label in (None, *labels):
            so_far, total = steps(label)
            name = label or "whole study, steps"
            tasks[label] = bars.add_task(name, total=total, completed=so_far, note="")

        def update(jobs: Sequence[Job]) -> None:
            if bars.is_due:  # it reads all runs' metrics
                done.update({job.folder: _steps_done(job) for job in training})
                for label, task in tasks.items():
                    bars.update(task, completed=steps(label)[0], note=_newest(training, label))
            for job in training:
                rows = _rows(job)
                for row in rows[read[job.folder] :]:
                    for line in findings[job.folder].new(row):
                        print_finding(console, f"{job.label} seed {job.seed}: {line}")
                read[job.folder] = len(rows)
            for job in jobs:
                if job.folder not in announced and RunFolder(job.folder).is_complete:
                    announced.add(job.folder)
                    _announce(job, console)

        yield update


@contextmanager
def inspection_progress() -> Iterator[Callable[[int, int], None]]:
    """Show a bar over rollouts being scored; yields a function that takes (done, total)."""
    with _bars(Console(stderr=True)) as bars:
        task = bars.add_task("scoring", total=None, note="rollouts")

        def show(done: int, total: int) -> None:
            bars.update(task, completed=done, total=total)

        yield show


@contextmanager
def forecast_progress() -> Iterator[Callable[[str, int, int], None]]:
    """Show a bar of what a forecast is doing; yields a function that takes (what, done, total)."""
    with _bars(Console(stderr=True)) as bars:
        task = bars.add_task("building the model", total=None, note="")

        def show(what: str, done: int, total: int) -> None:
            bars.update(task, description=what, completed=done, total=total)

        yield show


def note(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Format the main metrics from the last row of each kind; leaves out what is not logged."""
    step, validation = rows.get("step", {}), rows.get("validation")
    entries = [
        f"{title} {form.format(step[name])}"
        for name, (title, form) in SHOWN_METRICS.items()
        if name in step and (step[name] or name not in HIDDEN_IF_ZERO)
    ]
    if validation is not None:
        entries.append(f"Avg@{validation['k']} {validation['avg']:.1f} %")
    return "  ".join(entries)


def _bars(console: Console) -> Bars:
    return Bars(
        TextColumn("{task.description:<30}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
        speed_estimate_period=SPEED_PERIOD,
        refresh_per_second=2,  # 10 per second would use a tenth of a core
        disable=not console.is_terminal,  # a log file gets lines instead of redrawn bars
    )


def _log_line(task: Task) -> str:
    """Format a bar as a line: what is done, the time it took and the time left."""
    total = "" if task.total is None else f" of {task.total:,.0f}"
    times = {"elapsed": task.elapsed, "left": task.time_remaining}
    shown = [f"{timedelta(seconds=int(s))} {name}" for name, s in times.items() if s is not None]
    done = task.description.strip()
    if task.completed or task.total is not None:  # else it has not begun
        done += f": {task.completed:,.0f}{total}"
    return "  ".join([", ".join([done, *shown]), *filter(None, [task.fields["note"]])])


def _newest(jobs: Sequence[Job], label: str | None) -> str:
    """Return the metrics of the arm's run that wrote last; empty for the study as a whole."""
    paths = [RunFolder(job.folder).metrics_path for job in jobs if label == job.label]
    written = [(path.stat().st_mtime_ns, path) for path in paths if path.exists()]
    return _note_of(*max(written)) if written else ""


@lru_cache(maxsize=64)
def _note_of(_written: int, metrics: Path) -> str:
    """Return the note of a metrics file, read again only after it was written."""
    return note({row["kind"]: row for row in _rows_of(_written, metrics)})


def _rows(job: Job) -> list[dict[str, Any]]:
    """Return the metrics of a run so far, read again only after they were written."""
    path = RunFolder(job.folder).metrics_path
    return _rows_of(path.stat().st_mtime_ns, path) if path.exists() else []


@lru_cache(maxsize=64)
def _rows_of(_written: int, metrics: Path) -> list[dict[str, Any]]:
    return RunFolder(metrics.parent).metrics()


def _announce(job: Job, console: Console) -> None:
    evaluations = [row for row in RunFolder(job.folder).metrics() if row["kind"] != "step"]
    if evaluations:
        row = evaluations[-1]
        line = f"{job.label} seed {job.seed}: {row['kind']} Avg@{row['k']} {row['avg']:.1f} %"
        console.print(line, highlight=False)


def _steps_done(job: Job) -> int:
    folder = RunFolder(job.folder)
    if folder.is_complete:
        return job.recipe.train.steps
    return max((row["step"] for row in folder.metrics() if row["kind"] == "step"), default=0)
