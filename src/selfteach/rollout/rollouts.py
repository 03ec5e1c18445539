"""Answers to many problems, batch by batch, each batch on disk before it is used."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from selfteach.errors import CheckpointError, EngineError
from selfteach.protocols import Engine
from selfteach.runtime.distributed import SINGLE_PROCESS, Ranks
from selfteach.runtime.run_folder import RunFolder
from selfteach.tasks.lab import lab_task as lab_task
from selfteach.types import Problem, Rollout, Sampling


class Interrupted(EngineError):
    """An engine is gone in the middle of a batch; ``received`` are the answers that are worth keeping.

    They are all answers to some of the batch's problems, in order.
    """

    def __init__(self, message: str, received: Sequence[Rollout]) -> None:
        super().__init__(message)
        self.received = tuple(received)


def sample_batches(
    engine: Engine | None,
    problems: Sequence[Problem],
    sampling: Sampling,
    *,
    batch_size: int,
    journal: RunFolder | None = None,
    name: str = "",
    ranks: Ranks = SINGLE_PROCESS,
) -> Iterator[list[Rollout]]:
    """``sampling.samples`` answers to each problem; with a journal, none that it already holds.

    Batches hold whole problems and at most ``batch_size`` answers (or one problem). A resumed run
    forms the same batches, so its answers are the same to the last bit. Of a batch that an engine has
    left unfinished (`Interrupted`) the problems that are answered are kept and not asked again. Each
    rank samples its share of the batches, which are those of one rank: a run may go on with another
    number of them. Without an engine all must be in the
    journal: raises `CheckpointError` for what is not.
    """
    per_batch = max(1, batch_size // sampling.samples)
    known = known_ids(problems)
    batches = list(enumerate(range(0, len(problems), per_batch)))
    for number, start in ranks.share(batches):
        part, asked = f"{name}.{number:03d}", problems[start : start + per_batch]
        batch = journal.load_rollouts(part, known) if journal else None
        if batch is not None and len(batch) < len(asked) * sampling.samples:
            batch = None  # a power cut has left a part of it
        if batch is None and engine is None:
            raise CheckpointError(
                f"rollouts/{part}.jsonl is missing, and the weights that could write it again are "
                "gone: put the file back, or begin anew in another folder"
            )
        if batch is None:
            assert engine is not None
            if journal is None:
                batch = engine.generate(asked, sampling)
            else:
                batch = _finish(engine, asked, sampling, journal, part)
        yield batch


def _finish(
    engine: Engine, problems: Sequence[Problem], sampling: Sampling, journal: RunFolder, part: str
) -> list[Rollout]:
    """A batch on disk, with what an earlier attempt had received of it."""
    unfinished = f"unfinished/{part}"
    kept = journal.load_rollouts(unfinished, known_ids(problems)) or []
    answered = {rollout.problem.id for rollout in kept}
    missing = [problem for problem in problems if problem.id not in answered]
    try:
        sampled = engine.generate(missing, sampling)
    except Interrupted as gone:
        journal.save_rollouts(unfinished, [*kept, *gone.received])
        raise
    place = {problem.id: at for at, problem in enumerate(problems)}
    batch = sorted([*kept, *sampled], key=lambda r: (place[r.problem.id], r.sample))
    journal.save_rollouts(part, batch)
    journal.delete_rollouts(unfinished)
    return batch


def signed(rollouts: list[Rollout], version: int) -> list[Rollout]:
    """The answers, if these weights wrote them. Raises `CheckpointError` if others did."""
    for rollout in rollouts:
        if rollout.policy_version != version:
            raise CheckpointError(
                f"an answer to problem {rollout.problem.id!r} is of version "
                f"{rollout.policy_version} of the weights, and version {version} was to write it: "
                "these answers belong to another run"
            )
    return rollouts


def known_ids(problems: Sequence[Problem]) -> dict[str, Problem]:
    """Problems by id."""
    return {problem.id: problem for problem in problems}
