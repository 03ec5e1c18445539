"""Read and write a run folder, which people, pandas and DuckDB can read without this package.

    config.json            the resolved recipe
    recipe.toml            the same as a recipe file, for another run
    environment.json       commit, versions, machine
    problems.json          fingerprints of the problem sets
    parts.json, parts/     hashes and copies of parts of one's own
    metrics.jsonl          one line per step, and per evaluation
    checksums.jsonl        checksums of the files of rollouts, critiques, samples and evaluations
    tracking.json          rows of metrics.jsonl that each sink has received; only with sinks
    rollouts/              a file per batch, written before the rollouts are used; unfinished/ holds
                           the complete groups of a batch in which the engine failed
    critiques/             a file per batch, written before the critiques are used
    rewards/               a file per batch and reward, written before it is used; only with [reward]
    samples/               verdict, critique and context of each rollout; a file per step
    verifier_timeouts.jsonl  comparisons of answers that took too long; only with some
    evaluations/           per-problem results, a file per evaluation
    checkpoints/           what a resume needs
    model/                 the final model in Hugging Face format
    result.json            written last: the run is complete

Files are written atomically (to a temporary file, flushed, renamed): a kill at any moment leaves no
partial file, and what is in the folder is never sampled or requested again. Rollouts, critiques and
samples are renamed first and flushed in the background, a few milliseconds each, before a row of
metrics or a checkpoint is written that depends on them: a file that a power cut has truncated before
that is recognised and made again. A flushed file has a checksum: if it differs, the run is refused.
"""

from __future__ import annotations

import fcntl
import json
import logging
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from selfteach.config.migrations import migrate_config, migrate_metrics, run_subfolder
from selfteach.config.part_names import unanchored
from selfteach.config.recipe_file import complete_config
from selfteach.config.server_address import without_addresses
from selfteach.errors import CheckpointError, Terminated
from selfteach.runtime.atomic_files import (
    append_line,
    atomic_path,
    json_lines,
    make_folder,
    report_full_disk,
    write_json,
    write_text,
)
from selfteach.runtime.background_flush import flush_later
from selfteach.runtime.checksums import Checksums
from selfteach.runtime.folder_start import (
    clear_start,
    holds_work,
    is_our_config,
    require_empty,
    write_recipe,
)
from selfteach.runtime.kept_work import describe_progress
from selfteach.runtime.stored_files import (
    Row,
    read_bytes,
    read_json,
    read_lines,
    read_metrics,
    reading,
)
from selfteach.runtime.stored_records import (
    Decode,
    SavedCritiques,
    critiques_by_key,
    problems_fingerprint,
    rollout_row,
    rollouts_from,
    sample_rows,
)
from selfteach.types import Critique, CritiqueFailure, Problem, Rollout, TrainingSample

log = logging.getLogger(__name__)

LOCK_PATIENCE_S = 5.0
"""Seconds to wait for the lock of a folder whose process may just have been killed."""


class RunFolder:
    """Reads and writes the records of one run."""

    def __init__(self, path: str | Path) -> None:
        self.path = path = Path(path)
        self.metrics_path = path / "metrics.jsonl"
        self.result_path = path / "result.json"
        self.problems_path = path / "problems.json"
        self.checkpoints = path / "checkpoints"
        self._checksums = Checksums(path)
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
        return (read_bytes(path) or b"").decode("ascii", "replace") or str(path.resolve())

    def create(self, config: Mapping[str, Any], environment: Mapping[str, Any]) -> None:
        """Start a run in this folder, or continue the same one.

        The config of a folder that an earlier version has written is completed before the comparison.
        Tracking, distributed settings, folders of parts and addresses of servers may differ: they
        change no result. A run that has spent nothing is replaced. Raises `CheckpointError` if the
        folder holds something else.
        """
        ignored = {"tracking": None, "distributed": None}
        if (self.path / "config.json").exists():
            old, new = complete_config(self.config()), json.loads(json.dumps(config))
            before, now = (without_addresses(unanchored(c | ignored)) for c in (old, new))
            if before == now:
                write_recipe(self.path, config)  # a folder of an earlier version has none
                return
            if holds_work(self.path) or not is_our_config(old):
                raise CheckpointError(
                    f"{self.path} holds another run; choose another --out, "
                    f"or continue that run: selfteach resume {self.path}"
                )
            clear_start(self.path)
        require_empty(self.path)
        with report_full_disk():
            make_folder(self.path)
        write_json(self.path / "environment.json", environment)
        write_json(self.path / "config.json", config)
        write_recipe(self.path, config)

    def memory_choices(self) -> tuple[int, bool]:
        """Return the micro-batch in tokens, and whether activations are recomputed, as at the start."""
        environment = read_json(self.path / "environment.json")
        tokens = environment.get("micro_batch_tokens", 16_384)  # of earlier versions
        return tokens, environment.get("gradient_checkpointing", False)

    def config(self) -> Row:
        """Return the resolved recipe. Raises `CheckpointError` if there is none."""
        path = self.path / "config.json"
        if not path.exists() and (self.path / "environment.json").exists():
            raise CheckpointError(
                f"{self.path}: its run was stopped before it began; repeat the command that started it"
            )
        values = read_json(path)
        with reading(path):
            return migrate_config(values, str(path))

    def require_problems(self, splits: Mapping[str, Sequence[Problem]]) -> None:
        """Record the problem sets of a run that begins; later, require the same ones.

        Raises `CheckpointError` if problems were added, removed, changed or put in another order: what
        is stored belongs to the earlier ones.
        """
        now = {name: problems_fingerprint(problems) for name, problems in splits.items()}
        if not self.problems_path.exists():
            write_json(self.problems_path, now)
            return
        saved = read_json(self.problems_path)
        for name, fingerprint in now.items():
            with reading(self.problems_path):
                same, count = saved[name] == fingerprint, saved[name]["problems"]
            if not same:
                raise CheckpointError(
                    f"{self.path}: the {name} problems are not those with which this run began "
                    f"({count} then, {fingerprint['problems']} now; the same number means another "
                    "order or text): restore the data, or start a new run in another folder"
                )

    def has_problems_of(self, other: RunFolder, split: str) -> bool:
        """Return True if both runs have recorded the same problems of a split."""
        paths = (self.problems_path, other.problems_path)
        if not all(path.exists() for path in paths):
            return False
        ours, theirs = (read_json(path).get(split) for path in paths)
        return ours is not None and ours == theirs

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Lock the folder, so that two processes never write one run.

        Raises `CheckpointError` if another process holds the lock, or the folder holds other files.
        """
        if not any((self.path / name).exists() for name in ("config.json", "study.json")):
            require_empty(self.path)  # before the lock file, so that nothing is left in it
        with report_full_disk():
            make_folder(self.path)
            handle = (self.path / ".lock").open("w")
        with handle:
            _acquire(handle, self.path)
            try:
                yield
            except Terminated as end:
                self.flushed()
                end.progress = end.progress or self.describe_progress()
                raise
            self.flushed()

    def describe_progress(self) -> str:
        """Return what of this folder's work is on disk, and how to continue, for a person."""
        return describe_progress(self.path)

    # -- rollouts, critiques, samples --------------------------------------------------------

    def _write(self, path: Path, rows: Iterable[Any]) -> None:
        """Write JSON lines and flush them in the background. Raises the error of an earlier flush."""
        finished = [flush for flush in self._flushing if flush.done()]
        self._flushing = [flush for flush in self._flushing if flush not in finished]
        for flush in finished:
            flush.result()
        text = json_lines(rows)
        if self._checksums.holds(path):
            if (read_bytes(path) or b"") == text.encode():
                return
            self._checksums.record(path, None)
        with atomic_path(path, flushed=False) as temporary:
            temporary.write_text(text, encoding="utf-8")
        self._flushing.append(flush_later(path, self._checksums, text.encode()))

    def flushed(self) -> None:
        """Wait until all files are flushed to disk. Raises `CheckpointError` if the disk is full."""
        waiting, self._flushing = self._flushing, []
        for flush in waiting:
            flush.result()

    def _read(self, path: Path) -> list[Row] | None:
        """Read JSON lines; None if there is no such file, or a power cut has truncated it.

        Raises `CheckpointError` if it is damaged.
        """
        content = read_bytes(path)
        if content is None:
            return None
        whole = self._checksums.verify(path, content)
        rows, cut_off = read_lines(content, path)
        if not whole:  # its disk has lost the end of a file that was flushed
            aside = path.with_name(f"{path.name}.cut_off")
            log.warning("%s was cut off: it is made again, what is left of it is %s", path, aside)
            path.replace(aside)
            return None
        return None if cut_off else rows

    def save_rollouts(self, name: str, rollouts: Sequence[Rollout]) -> None:
        """Save the rollouts of one batch, under a name like ``step_000012.000``."""
        self._write(self._rollouts_path(name), map(rollout_row, rollouts))

    def load_rollouts(self, name: str, problems: Mapping[str, Problem]) -> list[Rollout] | None:
        """Return the rollouts saved under a name; None if there are none, or the file is truncated.

        Raises `CheckpointError` if the file is damaged, or if its rollouts are of other problems.
        """
        path = self._rollouts_path(name)
        rows = self._read(path)
        return None if rows is None else rollouts_from(rows, problems, path)

    def copy_rollouts(self, name: str, other: RunFolder) -> None:
        """Copy another run's batches of a name, except those that this folder has."""
        for path in sorted(run_subfolder(other.path, "rollouts").glob(f"{name}.*.jsonl")):
            copy = run_subfolder(self.path, "rollouts") / path.name
            rows = None if copy.exists() else other._read(path)
            if rows is not None:
                self._write(copy, rows)

    def delete_rollouts(self, name: str) -> None:
        """Delete the rollouts saved under a name, if there are any, once those that replace them are
        on disk."""
        path = self._rollouts_path(name)
        if path.exists():
            self.flushed()
            path.unlink(missing_ok=True)

    def _rollouts_path(self, name: str) -> Path:
        return run_subfolder(self.path, "rollouts") / f"{name}.jsonl"

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

    def save_samples(
        self, step: int, samples: Sequence[TrainingSample], decode: Decode | None = None
    ) -> None:
        """Save a step's samples: verdict, critique, context; with ``decode`` the student's prompts."""
        path = run_subfolder(self.path, "samples") / f"step_{step:06d}.jsonl"
        self._write(path, sample_rows(samples, decode))

    def load_critiques(self, step: int) -> SavedCritiques:
        """Return the critiques of a step's rollouts by `Rollout.key`; empty if none are saved.

        They are in ``critiques/``; in a folder that an earlier version has begun, in ``samples/``.
        """
        critiques = self.load_named_critiques(f"step_{step:06d}")
        if critiques:
            return critiques
        samples = run_subfolder(self.path, "samples") / f"step_{step:06d}.jsonl"
        return critiques_by_key(self._read(samples) or [], samples)

    def load_named_critiques(self, name: str) -> SavedCritiques:
        """Return the critiques of all batches saved under a name; empty if there are none."""
        critiques: SavedCritiques = {}
        for path in sorted((self.path / "critiques").glob(f"{name}.*.jsonl")):
            critiques |= critiques_by_key(self._read(path) or [], path)
        return critiques

    def save_rewards(self, name: str, rows: Sequence[Row]) -> None:
        """Save one reward of a batch, under a name like ``step_000012.000.length``."""
        self._write(self.path / "rewards" / f"{name}.jsonl", rows)

    def load_rewards(self, name: str) -> list[Row] | None:
        """Return the rows saved under a name; None if there are none, or the file is truncated."""
        return self._read(self.path / "rewards" / f"{name}.jsonl")

    def save_evaluation(self, path: Path, values: Mapping[str, Any]) -> None:
        """Save the record of an evaluation, with its checksum."""
        if self._checksums.holds(path):
            self._checksums.record(path, None)
        write_json(path, values)
        self._checksums.record(path, path.read_bytes())

    # -- metrics -----------------------------------------------------------------------------

    def append_metrics(self, values: Mapping[str, Any]) -> None:
        """Append a line to metrics.jsonl; the line and all that it stands for are then on disk."""
        self.flushed()
        append_line(self.metrics_path, json.dumps(values))

    def metrics(self) -> list[dict[str, Any]]:
        """Return all complete lines of metrics.jsonl. Raises `CheckpointError` if one is damaged."""
        return [migrate_metrics(row) for _, row in read_metrics(self.metrics_path)]

    def truncate_metrics(self, step: int) -> None:
        """Remove the rows after a checkpoint and those of the test split, which are written again.

        The others stay as they are. Raises `CheckpointError` if a step's row is missing.
        """
        rows = read_metrics(self.metrics_path)
        steps = {row["step"] for _, row in rows if row["kind"] == "step"}
        if missing := sorted(set(range(1, step + 1)) - steps):
            raise CheckpointError(
                f"{self.metrics_path} lacks the rows of {len(missing)} steps before the checkpoint of "
                f"step {step} (the first is {missing[0]}): restore the file, or move it and "
                f"{self.checkpoints} away to train again from the stored rollouts"
            )
        retained = [line for line, row in rows if row["step"] <= step and row["kind"] != "test"]
        write_text(self.metrics_path, "".join(line.decode() + "\n" for line in retained))


def load_result(folder: str | Path) -> dict[str, Any]:
    """Return the result of a finished run: steps, seed, budget and learning curve."""
    return read_json(Path(folder) / "result.json")


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
