"""Progress bars with the time left and the numbers that matter, from what runs write down."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from selfteach.commands.study.jobs import Job
from selfteach.config.recipe import Recipe
from selfteach.runtime.run_folder import RunFolder

if TYPE_CHECKING:
    from selfteach.commands.select.selection import Standing

NOTED = {
    "correct": ("right", "{:.0%}"),
    "length": ("length", "{:.0f}"),
    "loss": ("loss", "{:.3f}"),
    "fidelity": ("fidelity", "{:.2f}"),
    "dropped": ("dropped", "{:.0%}"),
    "truncated": ("cut", "{:.0%}"),
}
"""Metrics that stand beside a bar: title and form."""
ONLY_IF_ANY = ("dropped", "truncated")
"""Troubles: not worth their place while there are none."""


@contextmanager
def run_progress(recipe: Recipe) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """One bar for one run; gives a function that shows a row of metrics."""
    console = Console(stderr=True)
    with _bars(console) as bars:
        task = bars.add_task("training", total=recipe.train.steps, note="")
        rows: dict[str, Mapping[str, Any]] = {}

        def show(row: Mapping[str, Any]) -> None:
            rows[row["kind"]] = row
            if row["kind"] == "step":
                bars.update(task, completed=row["step"], note=note(rows))
            else:
                line = (
                    f"step {row['step']:>4}  {row['kind']:<10}  Avg@{row['k']} {row['avg']:.1f} %"
                )
                console.print(line, highlight=False)

        yield show


@contextmanager
def review_progress() -> Iterator[Callable[[int, int], None]]:
    """One bar over answers that are marked; gives a function that takes how many of how many are."""
    with _bars(Console(stderr=True)) as bars:
        task = bars.add_task("marking", total=None, note="")
        yield lambda done, total: bars.update(task, completed=done, total=total)


@contextmanager
def selection_progress() -> Iterator[Callable[[Standing], None]]:
    """One bar for a selection; gives a function that shows how far it has come."""
    with _bars(Console(stderr=True)) as bars:
        task = bars.add_task("selecting", total=None, note="")

        def show(standing: Standing) -> None:
            note = f"kept {standing.kept:,}"
            bars.update(task, completed=standing.judged, total=standing.total, note=note)

        yield show


@contextmanager
def study_progress(jobs: Sequence[Job]) -> Iterator[Callable[[Sequence[Job]], None]]:
    """A bar for the whole study and one per arm; gives a function that looks at the runs' folders.

    Runs that end while it watches are announced in a line each, so that a log file shows them too.
    """
    console = Console(stderr=True)
    training = [job for job in jobs if job.recipe.train.steps > 0]
    labels = list(dict.fromkeys(job.label for job in training))
    done = {job.folder: _steps_done(job) for job in training}
    announced = {job.folder for job in jobs if RunFolder(job.folder).is_complete}

    def steps(label: str | None) -> tuple[int, int]:
        own = [job for job in training if label in (None, job.label)]
        return sum(done[job.folder] for job in own), sum(job.recipe.train.steps for job in own)

    with _bars(console) as bars:
        tasks = {}
        for label in (None, *labels):
            so_far, total = steps(label)
            name = label or "whole study"
            tasks[label] = bars.add_task(name, total=total, completed=so_far, note="")

        def look(jobs: Sequence[Job]) -> None:
            if not bars.disable:
                done.update({job.folder: _steps_done(job) for job in training})
                for label, task in tasks.items():
                    bars.update(task, completed=steps(label)[0], note=_newest(training, label))
            for job in jobs:
                if job.folder not in announced and RunFolder(job.folder).is_complete:
                    announced.add(job.folder)
                    _announce(job, console)

        yield look


@contextmanager
def answers_progress() -> Iterator[Callable[[int, int], None]]:
    """One bar for answers that are scored; gives a function: so many, of so many."""
    with _bars(Console(stderr=True)) as bars:
        task = bars.add_task("scoring", total=None, note="answers")

        def show(done: int, total: int) -> None:
            bars.update(task, completed=done, total=total)

        yield show


def note(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The numbers that matter, from the last row of each kind; what is not logged is left out."""
    step, validation = rows.get("step", {}), rows.get("validation")
    said = [
        f"{title} {form.format(step[name])}"
        for name, (title, form) in NOTED.items()
        if name in step and (step[name] or name not in ONLY_IF_ANY)
    ]
    if validation is not None:
        said.append(f"Avg@{validation['k']} {validation['avg']:.1f} %")
    return "  ".join(said)


def _bars(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:<30}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
        refresh_per_second=2,  # ten times would take a tenth of a core from the work
        # A log file gets a line per finished run instead of redrawn bars.
        disable=not console.is_terminal,
    )


def _newest(jobs: Sequence[Job], label: str | None) -> str:
    """The numbers of an arm's run that wrote last; none for the study as a whole."""
    own = [RunFolder(job.folder).metrics_path for job in jobs if label == job.label]
    written = [(path.stat().st_mtime_ns, path) for path in own if path.exists()]
    return _note_of(*max(written)) if written else ""


@lru_cache(maxsize=64)
def _note_of(_written: int, metrics: Path) -> str:
    """The numbers that matter of a file, read once for each time that it was written."""
    return note({row["kind"]: row for row in RunFolder(metrics.parent).metrics()})


def _announce(job: Job, console: Console) -> None:
    scored = [row for row in RunFolder(job.folder).metrics() if row["kind"] != "step"]
    if scored:
        row = scored[-1]
        line = f"{job.label} seed {job.seed}: {row['kind']} Avg@{row['k']} {row['avg']:.1f} %"
        console.print(line, highlight=False)


def _steps_done(job: Job) -> int:
    folder = RunFolder(job.folder)
    if folder.is_complete:
        return job.recipe.train.steps
    return max((row["step"] for row in folder.metrics() if row["kind"] == "step"), default=0)
