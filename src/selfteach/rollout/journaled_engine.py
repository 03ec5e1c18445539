"""Sample rollouts batch by batch, each batch in the run folder before it is used."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence

from torch import Tensor

from selfteach.errors import CheckpointError, EngineError
from selfteach.protocols import Engine
from selfteach.runtime.distributed import SINGLE_PROCESS, Ranks
from selfteach.runtime.run_folder import RunFolder
from selfteach.types import Problem, Rollout, Sampling

ProblemBatch = tuple[int, Sequence[Problem]]
"""A batch's number among those of all ranks, and its problems."""

ONE_BATCH = sys.maxsize


class SamplingInterrupted(EngineError):
    """Raised by an engine that fails in the middle of a batch.

    ``received`` holds the complete groups of some of the batch's problems, in order; ``bare`` is the
    message without their number.
    """

    def __init__(self, message: str, received: Sequence[Rollout], *, bare: str = "") -> None:
        super().__init__(message)
        self.received, self.bare = tuple(received), bare or message


class BatchedEngine:
    """Samples through another engine in batches of whole groups.

    A batch has at most ``batch_size`` rollouts (or one group). Each rank samples its share of the
    batches. The batches do not depend on the number of ranks, so a run can be resumed on another
    number of them.
    """

    def __init__(self, engine: Engine, batch_size: int, ranks: Ranks = SINGLE_PROCESS) -> None:
        self.engine, self.batch_size, self.ranks = engine, batch_size, ranks

    def split(self, problems: Sequence[Problem], group_size: int) -> Sequence[ProblemBatch]:
        """Return this rank's batches."""
        size = max(1, self.batch_size // group_size)
        starts = range(0, len(problems), size)
        batches = [(number, problems[at : at + size]) for number, at in enumerate(starts)]
        return self.ranks.share(batches)

    def count(self, problems: Sequence[Problem], group_size: int) -> int:
        """Return the number of batches of all ranks."""
        return -(-len(problems) // max(1, self.batch_size // group_size))

    def generate(self, problems: Sequence[Problem], sampling: Sampling) -> list[Rollout]:
        """Sample ``sampling.samples`` rollouts of each problem of this rank's batches."""
        batches = self.split(problems, sampling.samples)
        return [r for _, batch in batches for r in self.engine.generate(batch, sampling)]

    def load_weights(self, named_weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Load the weights into the engine."""
        self.engine.load_weights(named_weights, version)


class JournaledEngine:
    """Samples through another engine and journals the rollouts in a run folder, batch by batch.

    The batches are those of a `BatchedEngine`; any other engine samples all rollouts in one batch.

    Batches that are in the folder are read instead of sampled. A resumed run forms the same batches,
    so its rollouts are bitwise the same. Of a batch in which the engine failed
    (`SamplingInterrupted`) the complete groups are saved and are not sampled again.

    ``name`` begins the names of the batches' files, like ``step_000012``, and their numbers begin with
    ``first_batch``. With ``version`` every
    rollout must be of that policy version. ``weights_lost``: the weights that should sample no longer
    exist (a resumed asynchronous run), so every batch must be in the folder. ``on_batch`` gets each
    batch's number and rollouts when they are complete.
    """

    def __init__(
        self,
        engine: Engine,
        run: RunFolder,
        name: str,
        *,
        first_batch: int = 0,
        version: int | None = None,
        weights_lost: bool = False,
        on_batch: Callable[[int, list[Rollout]], None] | None = None,
    ) -> None:
        batched = isinstance(engine, BatchedEngine)
        self._engine = engine if batched else BatchedEngine(engine, ONE_BATCH)
        self._run, self._name, self._first_batch = run, name, first_batch
        self._version, self._weights_lost, self._on_batch = version, weights_lost, on_batch

    def generate(self, problems: Sequence[Problem], sampling: Sampling) -> list[Rollout]:
        """Return this rank's rollouts. Raises `CheckpointError` for what cannot be read or sampled."""
        return [r for batch in self.batches(problems, sampling) for r in batch]

    def batches(self, problems: Sequence[Problem], sampling: Sampling) -> Iterator[list[Rollout]]:
        """Yield this rank's rollouts batch by batch."""
        for index, batch in self._engine.split(problems, sampling.samples):
            number = self._first_batch + index
            rollouts = self._read_or_sample(f"{self._name}.{number:03d}", batch, sampling)
            self._check_version(rollouts)
            if self._on_batch is not None:
                self._on_batch(number, rollouts)
            yield rollouts

    def next_batch(self, problems: Sequence[Problem], sampling: Sampling) -> int:
        """Return the number after the batches of these problems."""
        return self._first_batch + self._engine.count(problems, sampling.samples)

    def load_weights(self, named_weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Load the weights into the engine."""
        self._engine.load_weights(named_weights, version)

    def _read_or_sample(
        self, name: str, problems: Sequence[Problem], sampling: Sampling
    ) -> list[Rollout]:
        saved = self._run.load_rollouts(name, problems_by_id(problems))
        expected = [(problem.id, n) for problem in problems for n in range(sampling.samples)]
        if saved is not None and [rollout.key for rollout in saved] == expected:
            return saved
        if saved is not None and len(saved) >= len(expected):
            raise CheckpointError(
                f"rollouts/{name}.jsonl holds other rollouts than those of this batch: the data or the "
                "batches have changed since; restore the data, or start a new run in another folder"
            )  # with fewer rollouts a power cut has left a part of the file
        if self._weights_lost:
            raise CheckpointError(
                f"rollouts/{name}.jsonl is missing, and the weights that could sample it again no "
                "longer exist: restore the file, or start a new run in another folder"
            )
        return self._sample(name, problems, sampling)

    def _sample(self, name: str, problems: Sequence[Problem], sampling: Sampling) -> list[Rollout]:
        """Sample a batch, except for the groups that an earlier attempt has received."""
        unfinished = f"unfinished/{name}"
        received = self._run.load_rollouts(unfinished, problems_by_id(problems)) or []
        complete = {rollout.problem.id for rollout in received}
        missing = [problem for problem in problems if problem.id not in complete]
        try:
            sampled = self._engine.engine.generate(missing, sampling)
        except SamplingInterrupted as failure:
            self._run.save_rollouts(unfinished, [*received, *failure.received])
            raise
        place = {problem.id: at for at, problem in enumerate(problems)}
        rollouts = sorted([*received, *sampled], key=lambda r: (place[r.problem.id], r.sample))
        self._run.save_rollouts(name, rollouts)
        self._run.delete_rollouts(unfinished)
        return rollouts

    def _check_version(self, rollouts: Sequence[Rollout]) -> None:
        for rollout in rollouts:
            if self._version is not None and rollout.policy_version != self._version:
                raise CheckpointError(
                    f"a rollout of problem {rollout.problem.id!r} is of policy version "
                    f"{rollout.policy_version}, expected {self._version}: these rollouts belong to "
                    "another run"
                )


def problems_by_id(problems: Sequence[Problem]) -> dict[str, Problem]:
    """Map each problem's id to the problem; also the id that earlier versions gave it."""
    by_place = {problem.place: problem for problem in problems if problem.place}
    return by_place | {problem.id: problem for problem in problems}
