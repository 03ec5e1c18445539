"""A run is a folder that a person, pandas or DuckDB can read without us.

    config.json            the resolved recipe
    environment.json       commit, versions, machine
    metrics.jsonl          one line per step, and per evaluation
    tracking.json          how much of it each sink has been given; only where there are sinks
    rollouts/              sampled answers, a file per batch, written before they are used;
                           unfinished/ holds what came of a batch before its engine died
    critiques/             what the critic returned, a file per batch, written before it is used
    samples/               what was said of them: verdict, critique, context; a file per step
    evaluations/           per-problem results, a file per evaluation
    checkpoints/           what a resume needs
    model/                 the final model in Hugging Face format
    result.json            written last: the run is complete

Files appear whole or not at all (written aside, flushed, renamed), so a kill at any moment leaves
nothing half-written, and what is there is never sampled or bought again. Answers and samples are
renamed first and flushed while the work goes on, a few milliseconds each, before a checkpoint counts on
them: what a power cut leaves of them in between is known as cut off, and made again.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TextIO

from safetensors import SafetensorError

from selfteach.config.migrations import (
    migrate_config,
    migrate_metrics,
    migrate_rollout,
    migrate_usage,
    run_subfolder,
)
from selfteach.errors import CheckpointError
from selfteach.types import (
    Critique,
    CritiqueFailure,
    CritiqueStep,
    Problem,
    Rollout,
    TrainingSample,
    Usage,
)

ANSWER_FIELDS = [field.name for field in fields(Rollout) if field.name != "problem"]

LOCK_PATIENCE_S = 5.0
"""How long to wait for a folder whose owner may just have been killed."""


UNWRITABLE = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR,
    errno.ENOENT,
}  # fmt: skip
"""What a full, read-only or impossible place to write says."""


class RunFolder:
    """Paths and records of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics_path = path / "metrics.jsonl"
        self.result_path = path / "result.json"
        self.checkpoints = path / "checkpoints"
        self._flushing: list[Future[None]] = []

    @property
    def is_complete(self) -> bool:
        """True once the run has ended by itself."""
        return self.result_path.exists()

    def create(
        self,
        config: Mapping[str, Any],
        environment: Mapping[str, Any],
        as_now: Callable[[dict[str, Any]], Mapping[str, Any]] = lambda config: config,
    ) -> None:
        """Begin a run here. Raises `CheckpointError` if the folder holds something else.

        ``as_now`` gives a folder's config what recipes have had since it was begun. Where a run's
        numbers are copied to is no part of what it is, nor how ranks divide it.
        """
        elsewhere = {"tracking": None, "distributed": None}
        if (self.path / "config.json").exists():
            old, new = dict(as_now(self.config())), json.loads(json.dumps(config))
            if old | elsewhere != new | elsewhere:
                raise CheckpointError(
                    f"{self.path} holds another run; choose another --out, "
                    f"or go on with that one: selfteach resume {self.path}"
                )
            return
        require_empty(self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.path / "environment.json", environment)
        write_json(self.path / "config.json", config)

    def config(self) -> dict[str, Any]:
        """The resolved recipe. Raises `CheckpointError` if there is none."""
        path = self.path / "config.json"
        return migrate_config(read_json(path), str(path))

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder: two processes never write one run.

        Raises `CheckpointError` if another one does, or if the folder is somebody else's.
        """
        if not any((self.path / own).exists() for own in ("config.json", "study.json")):
            require_empty(self.path)  # before the lock file, so that nothing is left in it
        with enough_disk():
            self.path.mkdir(parents=True, exist_ok=True)
            handle = (self.path / ".lock").open("w")
        with handle:
            _acquire(handle, self.path)
            yield
            self.flushed()

    # -- answers and samples -----------------------------------------------------------------

    def _write(self, path: Path, rows: Iterable[Any]) -> None:
        """JSON lines, there at once and on disk soon. Raises what an earlier flush has met with."""
        over = [flush for flush in self._flushing if flush.done()]
        self._flushing = [flush for flush in self._flushing if flush not in over]
        for flush in over:
            flush.result()
        with written_whole(path, flushed=False) as aside:
            aside.write_text(_lines(rows), encoding="utf-8")
        self._flushing.append(_flusher(os.getpid()).submit(_flush, path))

    def flushed(self) -> None:
        """Wait until answers and samples are on disk. Raises `CheckpointError` where that is full."""
        waiting, self._flushing = self._flushing, []
        for flush in waiting:
            flush.result()

    def save_rollouts(self, name: str, rollouts: Sequence[Rollout]) -> None:
        """Answers of one batch, by a name like ``step_000012.000``."""
        rows = (
            {"problem_id": r.problem.id, **{name: getattr(r, name) for name in ANSWER_FIELDS}}
            for r in rollouts
        )
        self._write(run_subfolder(self.path, "rollouts") / f"{name}.jsonl", rows)

    def load_rollouts(self, name: str, problems: Mapping[str, Problem]) -> list[Rollout] | None:
        """Answers saved under a name; None if there are none, or a power cut has left a part."""
        rows = _read_lines(run_subfolder(self.path, "rollouts") / f"{name}.jsonl")
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
        """Copy the batches that another run has on disk under a name, but for those that are here."""
        for path in sorted(run_subfolder(other.path, "rollouts").glob(f"{name}.*.jsonl")):
            own = run_subfolder(self.path, "rollouts") / path.name
            if not own.exists():
                write_text(own, path.read_text(encoding="utf-8"))

    def delete_rollouts(self, name: str) -> None:
        """Remove what was saved under a name, if anything was."""
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
        batches = sorted((self.path / "critiques").glob(f"step_{step:06d}.*.jsonl"))
        rows = [row for path in batches for row in _read_lines(path) or []]
        if not rows:
            samples = run_subfolder(self.path, "samples") / f"step_{step:06d}.jsonl"
            rows = _read_lines(samples) or []
        return {(row["problem_id"], row["sample"]): critique_from(row["critique"]) for row in rows}

    # -- metrics -----------------------------------------------------------------------------

    def append_metrics(self, values: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl."""
        with enough_disk(), self.metrics_path.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(values) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """All whole lines of metrics.jsonl."""
        if not self.metrics_path.exists():
            return []
        rows = []
        for line in self.metrics_path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(migrate_metrics(json.loads(line)))
            except json.JSONDecodeError:
                break  # the line that a kill cut off
        return rows

    def truncate_metrics(self, step: int) -> None:
        """Forget what comes after a checkpoint, the test evaluation too: it is written again."""
        kept = (r for r in self.metrics() if r["step"] <= step and r["kind"] != "test")
        write_lines(self.metrics_path, kept)


def sample_row(sample: TrainingSample) -> dict[str, Any]:
    """A sample as one JSON object; joins the answers by problem_id and sample."""
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


def result_of(folder: Path) -> dict[str, Any]:
    """A complete run's result: budget, learning curve, and the file of its test evaluation."""
    return read_json(folder / "result.json")


def write_json(path: Path, value: Any) -> None:
    """A JSON file, whole or not at all."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file. Raises `CheckpointError` if it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} is no run folder: it has no {path.name}") from None
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None


def write_lines(path: Path, rows: Any) -> None:
    """JSON lines, whole or not at all."""
    write_text(path, _lines(rows))


def _lines(rows: Iterable[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def _read_lines(path: Path) -> list[dict[str, Any]] | None:
    """The rows of JSON lines; None if there is no such file, or it is cut off."""
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (FileNotFoundError, json.JSONDecodeError):
        return None


@functools.lru_cache(maxsize=1)
def _flusher(process: int) -> ThreadPoolExecutor:
    """One thread for all folders: files reach the disk in the order in which they were written.

    A process that is forked off has none of its parent's threads, and gets one of its own.
    """
    return ThreadPoolExecutor(1, "flush")


def _flush(path: Path) -> None:
    """Raises `CheckpointError` when the disk is full."""
    with enough_disk():
        try:
            handle = path.open("rb+")
        except FileNotFoundError:  # forgotten in the meantime
            return
        with handle:
            os.fsync(handle.fileno())


def write_text(path: Path, text: str) -> None:
    """Write aside, flush to disk, rename. Raises `CheckpointError` when the disk is full."""
    with written_whole(path) as aside:
        aside.write_text(text, encoding="utf-8")


@contextmanager
def written_whole(path: Path, *, flushed: bool = True) -> Iterator[Path]:
    """A path beside ``path`` to write to; put in its place on leaving, and gone on an error.

    Raises `CheckpointError` when the disk is full.
    """
    aside = path.with_name(path.name + ".tmp")
    with enough_disk():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield aside
            if flushed:
                with aside.open("rb+") as handle:
                    os.fsync(handle.fileno())
            aside.replace(path)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise


@contextmanager
def enough_disk() -> Iterator[None]:
    """RolloutRequest a full or read-only disk into one clear line."""
    try:
        yield
    except OSError as error:
        if error.errno in UNWRITABLE:
            raise CheckpointError(
                f"cannot write {error.filename or 'the run folder'}: {error.strerror}; "
                "nothing is lost: make room and call selfteach resume"
            ) from error
        raise
    except SafetensorError as error:  # its own name for what the system said
        raise CheckpointError(
            f"cannot write tensors into the run folder: {error}; "
            "nothing is lost: make room and call selfteach resume"
        ) from error


def require_empty(path: Path) -> None:
    """Raises `CheckpointError` if a new run's folder is a file or holds anything already."""
    if path.is_file():
        raise CheckpointError(f"--out {path} is a file; name a new or an empty folder")
    if path.is_dir() and any(child.name != ".lock" for child in path.iterdir()):
        raise CheckpointError(f"--out {path} is not empty; name a new or an empty folder")


def _acquire(handle: TextIO, path: Path) -> None:
    deadline = time.monotonic() + LOCK_PATIENCE_S
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise CheckpointError(
                    f"{path}: another process is at work in this folder"
                ) from None
            time.sleep(0.1)


def critique_from(row: dict[str, Any] | None) -> Critique | CritiqueFailure | None:
    """A critique, or the reason for none, from a row of ``samples/``."""
    if row is None:
        return None
    usage = Usage(**migrate_usage(row.get("usage", {})))
    if "reason" in row:
        said, answer = row.get("said", ""), row.get("answer")
        return CritiqueFailure(row["reason"], row.get("detail", ""), usage, said, answer)
    return Critique(
        case=row["case"],
        steps=tuple(CritiqueStep(**step) for step in row["steps"]),
        answer=row["answer"],
        first_error=row["first_error"],
        usage=usage,
    )
