"""Read and write a run folder, which people, pandas and DuckDB can read without this package.

    config.json            the resolved recipe
    environment.json       commit, versions, machine
    metrics.jsonl          one line per step, and per evaluation
    tracking.json          rows of metrics.jsonl that each sink has received; only with sinks
    rollouts/              a file per batch, written before the rollouts are used; unfinished/ holds
                           the complete groups of a batch in which the engine failed
    critiques/             a file per batch, written before the critiques are used
    samples/               verdict, critique and context of each rollout; a file per step
    verifier_timeouts.jsonl  comparisons of answers that took too long; only with some
    evaluations/           per-problem results, a file per evaluation
    checkpoints/           what a resume needs
    model/                 the final model in Hugging Face format
    result.json            written last: the run is complete

Files are written atomically (to a temporary file, flushed, renamed): a kill at any moment leaves no
partial file, and what is in the folder is never sampled or requested again. Rollouts, critiques and
samples are renamed first and flushed in the background, a few milliseconds each, before a checkpoint is
written that depends on them: a file that a power cut has truncated is recognised and made again.
"""

from __future__ import annotations

import fcntl
import functools
import json
import os
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TextIO

from selfteach.config.migrations import (
    migrate_config,
    migrate_metrics,
    migrate_rollout,
    migrate_usage,
    run_subfolder,
)
from selfteach.config.recipe_file import complete_config
from selfteach.errors import CheckpointError
from selfteach.runtime.atomic_files import (
    atomic_path,
    json_lines,
    read_json,
    read_lines,
    report_full_disk,
    require_empty,
    write_json,
    write_lines,
    write_text,
)
from selfteach.types import (
    Critique,
    CritiqueFailure,
    CritiqueStep,
    Problem,
    Rollout,
    TrainingSample,
    Usage,
)

ROLLOUT_FIELDS = [field.name for field in fields(Rollout) if field.name != "problem"]

LOCK_PATIENCE_S = 5.0
"""Seconds to wait for the lock of a folder whose process may just have been killed."""


class RunFolder:
    """Reads and writes the records of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics_path = path / "metrics.jsonl"
        self.result_path = path / "result.json"
        self.checkpoints = path / "checkpoints"
        self._flushing: list[Future[None]] = []

    @property
    def is_complete(self) -> bool:
        """Return True once the run has finished."""
        return self.result_path.exists()

    @property
    def identity(self) -> str:
        """Return an id of this run that no other has and that stays when the folder is moved."""
        path = self.path / ".identity"
        self.path.mkdir(parents=True, exist_ok=True)
        with report_full_disk(), suppress(FileExistsError), path.open("x", encoding="ascii") as new:
            new.write(uuid.uuid4().hex)
        # Empty if a kill or another rank came between the two lines above.
        return path.read_text(encoding="ascii") or str(path.resolve())

    def create(self, config: Mapping[str, Any], environment: Mapping[str, Any]) -> None:
        """Start a run in this folder, or continue the same one.

        The config of a folder that an earlier version has written is completed before the comparison.
        Tracking and distributed settings may differ: they do not change what a run computes. Raises
        `CheckpointError` if the folder holds something else.
        """
        ignored = {"tracking": None, "distributed": None}
        if (self.path / "config.json").exists():
            old, new = complete_config(self.config()), json.loads(json.dumps(config))
            if old | ignored != new | ignored:
                raise CheckpointError(
                    f"{self.path} holds another run; choose another --out, "
                    f"or continue that run: selfteach resume {self.path}"
                )
            return
        require_empty(self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.path / "environment.json", environment)
        write_json(self.path / "config.json", config)

    def config(self) -> dict[str, Any]:
        """Return the resolved recipe. Raises `CheckpointError` if there is none."""
        path = self.path / "config.json"
        return migrate_config(read_json(path), str(path))

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Lock the folder, so that two processes never write one run.

        Raises `CheckpointError` if another process holds the lock, or the folder holds other files.
        """
        if not any((self.path / name).exists() for name in ("config.json", "study.json")):
            require_empty(self.path)  # before the lock file, so that nothing is left in it
        with report_full_disk():
            self.path.mkdir(parents=True, exist_ok=True)
            handle = (self.path / ".lock").open("w")
        with handle:
            _acquire(handle, self.path)
            yield
            self.flushed()

    # -- rollouts, critiques, samples --------------------------------------------------------

    def _write(self, path: Path, rows: Iterable[Any]) -> None:
        """Write JSON lines and flush them in the background. Raises the error of an earlier flush."""
        finished = [flush for flush in self._flushing if flush.done()]
        self._flushing = [flush for flush in self._flushing if flush not in finished]
        for flush in finished:
            flush.result()
        with atomic_path(path, flushed=False) as temporary:
            temporary.write_text(json_lines(rows), encoding="utf-8")
        self._flushing.append(_flusher(os.getpid()).submit(_flush, path))

    def flushed(self) -> None:
        """Wait until all files are flushed to disk. Raises `CheckpointError` if the disk is full."""
        waiting, self._flushing = self._flushing, []
        for flush in waiting:
            flush.result()

    def save_rollouts(self, name: str, rollouts: Sequence[Rollout]) -> None:
        """Save the rollouts of one batch, under a name like ``step_000012.000``."""
        rows = (
            {"problem_id": r.problem.id, **{name: getattr(r, name) for name in ROLLOUT_FIELDS}}
            for r in rollouts
        )
        self._write(run_subfolder(self.path, "rollouts") / f"{name}.jsonl", rows)

    def load_rollouts(self, name: str, problems: Mapping[str, Problem]) -> list[Rollout] | None:
        """Return the rollouts saved under a name; None if there are none, or the file is truncated."""
        rows = read_lines(run_subfolder(self.path, "rollouts") / f"{name}.jsonl")
        if rows is None:
            return None
        rollouts = []
        for row in map(migrate_rollout, rows):
            problem = problems[row.pop("problem_id")]
            for field in ("prompt_ids", "token_ids", "logps"):
                row[field] = tuple(row[field])
            rollouts.append(Rollout(problem=problem, **row))
        return rollouts

    def copy_rollouts(self, name: str, other: RunFolder) -> None:
        """Copy another run's batches of a name, except those that this folder has."""
        for path in sorted(run_subfolder(other.path, "rollouts").glob(f"{name}.*.jsonl")):
            copy = run_subfolder(self.path, "rollouts") / path.name
            if not copy.exists():
                write_text(copy, path.read_text(encoding="utf-8"))

    def delete_rollouts(self, name: str) -> None:
        """Delete the rollouts saved under a name, if there are any."""
        (run_subfolder(self.path, "rollouts") / f"{name}.jsonl").unlink(missing_ok=True)

    def save_critiques(
        self,
        name: str,
        rollouts: Sequence[Rollout],
        critiques: Sequence[Critique | CritiqueFailure | None],
    ) -> None:
        """Save the critiques of one batch, under a name like ``step_000012.000``."""
        rows = (
            {
                "problem_id": rollout.problem.id,
                "sample": rollout.sample,
                "critique": None if critique is None else asdict(critique),
            }
            for rollout, critique in zip(rollouts, critiques, strict=True)
        )
        self._write(self.path / "critiques" / f"{name}.jsonl", rows)

    def save_samples(self, step: int, samples: Sequence[TrainingSample]) -> None:
        """Save a step's training samples: verdict, critique and context of each rollout."""
        self._write(
            run_subfolder(self.path, "samples") / f"step_{step:06d}.jsonl", map(sample_row, samples)
        )

    def load_critiques(self, step: int) -> dict[tuple[str, int], Critique | CritiqueFailure | None]:
        """Return the critiques of a step's rollouts by `Rollout.key`; empty if none are saved.

        They are in ``critiques/``; in a folder that an earlier version has begun, in ``samples/``.
        """
        critiques = self.load_named_critiques(f"step_{step:06d}")
        if critiques:
            return critiques
        samples = run_subfolder(self.path, "samples") / f"step_{step:06d}.jsonl"
        return _critiques_by_key(read_lines(samples) or [])

    def load_named_critiques(
        self, name: str
    ) -> dict[tuple[str, int], Critique | CritiqueFailure | None]:
        """Return the critiques of all batches saved under a name; empty if there are none."""
        batches = sorted((self.path / "critiques").glob(f"{name}.*.jsonl"))
        return _critiques_by_key(row for path in batches for row in read_lines(path) or [])

    # -- metrics -----------------------------------------------------------------------------

    def append_metrics(self, values: Mapping[str, Any]) -> None:
        """Append a line to metrics.jsonl."""
        with report_full_disk(), self.metrics_path.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(values) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """Return all complete lines of metrics.jsonl."""
        if not self.metrics_path.exists():
            return []
        rows = []
        for line in self.metrics_path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(migrate_metrics(json.loads(line)))
            except json.JSONDecodeError:
                break  # a kill has truncated the last line
        return rows

    def truncate_metrics(self, step: int) -> None:
        """Remove the rows after a checkpoint and those of the test split, which are written again."""
        rows = [r for r in self.metrics() if r["step"] <= step and r["kind"] != "test"]
        write_lines(self.metrics_path, rows)


def sample_row(sample: TrainingSample) -> dict[str, Any]:
    """Return a sample as one JSON object; joins the rollouts by problem_id and sample."""
    rollout, critique = sample.rollout, sample.critiqued.critique
    return {
        "problem_id": rollout.problem.id,
        "sample": rollout.sample,
        "question": rollout.problem.question,
        "answer": rollout.text,
        "finished": rollout.finished,
        **asdict(sample.critiqued.verdict),
        "critique": None if critique is None else asdict(critique),
        "context": sample.context,
        "dropped": sample.dropped,
        "steps": sample.steps,
        "gold": rollout.problem.answer,
        "first_error_token": sample.first_error_token,
        "first_change": None if sample.change is None else asdict(sample.change),
    }


def load_result(folder: Path) -> dict[str, Any]:
    """Return the result of a finished run: steps, seed, budget and learning curve."""
    return read_json(folder / "result.json")


@functools.lru_cache(maxsize=1)
def _flusher(process: int) -> ThreadPoolExecutor:
    """Return the thread that flushes files in the order in which they were written.

    It is cached per process: a forked process does not inherit its parent's threads.
    """
    return ThreadPoolExecutor(1, "flush")


def _flush(path: Path) -> None:
    """Flush a file. Raises `CheckpointError` if the disk is full."""
    with report_full_disk():
        try:
            handle = path.open("rb+")
        except FileNotFoundError:  # deleted in the meantime
            return
        with handle:
            os.fsync(handle.fileno())


def _acquire(handle: TextIO, path: Path) -> None:
    deadline = time.monotonic() + LOCK_PATIENCE_S
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise CheckpointError(f"{path}: another process is using this folder") from None
            time.sleep(0.1)


def _critiques_by_key(
    rows: Iterable[Mapping[str, Any]],
) -> dict[tuple[str, int], Critique | CritiqueFailure | None]:
    return {(row["problem_id"], row["sample"]): critique_from(row["critique"]) for row in rows}


def critique_from(row: dict[str, Any] | None) -> Critique | CritiqueFailure | None:
    """Return a critique, or the reason for none, from a row of ``critiques/`` or ``samples/``."""
    if row is None:
        return None
    usage = Usage(**migrate_usage(row.get("usage", {})))
    if "reason" in row:
        reply = row.get("reply", row.get("said", ""))  # "said" in folders of earlier versions
        return CritiqueFailure(
            row["reason"], row.get("detail", ""), usage, reply, row.get("answer")
        )
    return Critique(
        case=row["case"],
        steps=tuple(CritiqueStep(**step) for step in row["steps"]),
        answer=row["answer"],
        first_error=row["first_error"],
        usage=usage,
    )
