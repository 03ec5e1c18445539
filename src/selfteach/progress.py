"""Progress bars with the time left and the numbers that matter, from what runs write down."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from selfteach.config import Recipe
from selfteach.run_folder import RunFolder
from selfteach.study import Job


@contextmanager
def run_progress(recipe: Recipe) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """One bar for one run; gives a function that shows a row of metrics."""
    console = Console(stderr=True)
    with _bars(console) as bars:
        task = bars.add_task("training", total=recipe.train.steps, note="")

        def show(row: Mapping[str, Any]) -> None:
            if row["kind"] == "step":
                note = f"right {row['correct']:.0%}  length {row['length']:.0f}  loss {row['loss']:.3f}"
                bars.update(task, completed=row["step"], note=note)
            else:
                line = (
                    f"step {row['step']:>4}  {row['kind']:<10}  Avg@{row['k']} {row['avg']:.1f} %"
                )
                console.print(line, highlight=False)

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
            done.update({job.folder: _steps_done(job) for job in training})
            for label, task in tasks.items():
                bars.update(task, completed=steps(label)[0])
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
        # A log file gets a line per finished run instead of redrawn bars.
        disable=not console.is_terminal,
    )


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
