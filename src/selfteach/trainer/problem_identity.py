"""Require that a run which is continued has the problems with which it began."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import islice

from selfteach.config.migrations import run_subfolder
from selfteach.errors import CheckpointError
from selfteach.runtime.atomic_files import write_json
from selfteach.runtime.run_folder import RunFolder
from selfteach.runtime.stored_files import read_bytes, read_json, read_lines, reading
from selfteach.tasks.task import Task
from selfteach.trainer.build import Built
from selfteach.trainer.fit_checks import log_overlong
from selfteach.types import Problem

SPLITS = ("train", "validation", "test")
COUNTS = "counts"
"""Key in problems.json of the rows that were read and left out."""
ORDER, UNEVEN = "training_order", "uneven epochs"
"""Key and value in problems.json of a run that an earlier version began."""


def same_problems(run: RunFolder, built: Built) -> Built:
    """Record a run's problems, or require those that are recorded; all ranks call this together.

    In a folder that an earlier version has begun, problems without an id keep the ids of that version
    (file and row), since stored rollouts and random streams have them. Raises `CheckpointError` in one
    line if the data has changed.
    """
    task, ranks = built.task, built.components.ranks
    if ranks.broadcast(ranks.is_main and _has_ids_by_place(run, task)):
        task = _by_place(task)

    def agree() -> None:
        if not ranks.is_main:
            return
        began = not run.problems_path.exists()
        earlier = began and any(run_subfolder(run.path, "rollouts").glob("step_*.jsonl"))
        if began:
            _require_recorded_questions(run, task)
        run.require_problems({name: getattr(task, name) for name in SPLITS})
        log_overlong(task)
        order = {ORDER: UNEVEN} if earlier else {}
        counts = {COUNTS: dict(task.counts)} if began and task.counts else {}
        if added := order | counts:
            write_json(run.problems_path, {**read_json(run.problems_path), **added})

    ranks.all_or_raise(agree)
    return replace(built, task=task)


def has_uneven_epochs(run: RunFolder) -> bool:
    """Return True for a run that an earlier version began: it has that version's order of problems."""
    return read_json(run.problems_path).get(ORDER) == UNEVEN


def _has_ids_by_place(run: RunFolder, task: Task) -> bool:
    """Return True if the stored rollouts name problems by file and row."""
    problems = _problems_of(task)
    ids = {problem.id for problem in problems}
    places = {problem.place for problem in problems if problem.place} - ids
    files = sorted(run_subfolder(run.path, "rollouts").glob("*.jsonl")) if places else []
    for path in islice(files, 1):
        first = (read_bytes(path) or b"").partition(b"\n")[0]
        rows, _ = read_lines(first + b"\n" if first else b"", path)
        return any(row.get("problem_id") in places for row in rows)
    return False


def _by_place(task: Task) -> Task:
    splits = {
        name: tuple(replace(p, id=p.place or p.id, place="") for p in getattr(task, name))
        for name in SPLITS
    }
    return replace(task, **splits)


def _require_recorded_questions(run: RunFolder, task: Task) -> None:
    """Compare the problems with the questions in ``samples/`` of a folder without fingerprints."""
    problems = {problem.id: problem for problem in _problems_of(task)}
    for path in sorted(run_subfolder(run.path, "samples").glob("step_*.jsonl")):
        rows, _ = read_lines(read_bytes(path) or b"", path)
        for row in rows:
            with reading(path):
                id_, same = row["problem_id"], _is_of(row, problems)
            if not same:
                raise CheckpointError(
                    f"{path}: problem {id_!r} has another question or answer now: the data has changed "
                    "since this run began; restore it, or start a new run in another folder"
                )


def _is_of(row: Mapping[str, object], problems: Mapping[str, Problem]) -> bool:
    problem = problems.get(str(row["problem_id"]))
    if problem is None or row["question"] != problem.question:
        return False
    return row.get("gold") in (None, problem.answer)


def _problems_of(task: Task) -> tuple[Problem, ...]:
    return (*task.train, *task.validation, *task.test)
