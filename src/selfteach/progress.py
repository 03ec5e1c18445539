"""Progress bars with the time left and the numbers that matter, from what runs write down."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
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


class RunProgress:
    """One bar for one run."""

    def __init__(self, recipe: Recipe) -> None:
        self._console = Console(stderr=True)
        self._bars = _bars(self._console)
        self._task = self._bars.add_task("training", total=recipe.train.steps, note="")

    def __enter__(self) -> RunProgress:
        self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bars.stop()

    def __call__(self, row: Mapping[str, Any]) -> None:
        """Show one row of metrics."""
        if row["kind"] == "step":
            note = f"right {row['correct']:.0%}  length {row['length']:.0f}  loss {row['loss']:.3f}"
            self._bars.update(self._task, completed=row["step"], note=note)
        else:
            line = f"step {row['step']:>4}  {row['kind']:<10}  Avg@{row['k']} {row['avg']:.1f} %"
            self._console.print(line, highlight=False)


class StudyProgress:
    """A bar per arm and one for the whole study, read from the runs' own metrics."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self._console = Console(stderr=True)
        self._bars = _bars(self._console)
        self._jobs = [job for job in jobs if job.recipe.train.steps > 0]
        steps = sum(job.recipe.train.steps for job in self._jobs)
        done = sum(_steps_done(job) for job in self._jobs)
        self._all = self._bars.add_task("whole study", total=steps, completed=done, note="")
        self._arms = {
            label: self._bars.add_task(
                label,
                total=sum(j.recipe.train.steps for j in self._jobs if j.label == label),
                note="",
            )
            for label in dict.fromkeys(job.label for job in self._jobs)
        }
        self._finished = {job.folder for job in jobs if RunFolder(job.folder).is_complete}

    def __enter__(self) -> StudyProgress:
        self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bars.stop()

    def __call__(self, jobs: Sequence[Job]) -> None:
        """Look at the runs' folders."""
        total = 0
        by_arm: dict[str, int] = dict.fromkeys(self._arms, 0)
        for job in self._jobs:
            done = _steps_done(job)
            total += done
            by_arm[job.label] += done
        self._bars.update(self._all, completed=total)
        for label, task in self._arms.items():
            self._bars.update(task, completed=by_arm[label])
        for job in jobs:
            if job.folder not in self._finished and RunFolder(job.folder).is_complete:
                self._finished.add(job.folder)
                self._announce(job)

    def _announce(self, job: Job) -> None:
        scored = [row for row in RunFolder(job.folder).metrics() if row["kind"] != "step"]
        if scored:
            row = scored[-1]
            self._console.print(
                f"{job.label} seed {job.seed}: {row['kind']} Avg@{row['k']} {row['avg']:.1f} %",
                highlight=False,
            )


def _steps_done(job: Job) -> int:
    folder = RunFolder(job.folder)
    if folder.is_complete:
        return job.recipe.train.steps
    return max((row["step"] for row in folder.metrics() if row["kind"] == "step"), default=0)
