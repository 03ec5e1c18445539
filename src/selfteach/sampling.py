"""Answers to many problems, batch by batch, each batch on disk before it is used."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from selfteach.data import known_ids
from selfteach.errors import CheckpointError
from selfteach.protocols import Engine
from selfteach.run_folder import RunFolder
from selfteach.types import Problem, Rollout, Sampling


def sample_batches(
    engine: Engine | None,
    problems: Sequence[Problem],
    sampling: Sampling,
    *,
    batch_answers: int,
    journal: RunFolder | None = None,
    name: str = "",
) -> Iterator[list[Rollout]]:
    """``sampling.samples`` answers to each problem; with a journal, none that it already holds.

    Batches hold whole problems and at most ``batch_answers`` answers (or one problem). A resumed run
    forms the same batches, so its answers are the same to the last bit. Without an engine all must be
    in the journal: raises `CheckpointError` for what is not.
    """
    per_batch = max(1, batch_answers // sampling.samples)
    known = known_ids(problems)
    for number, start in enumerate(range(0, len(problems), per_batch)):
        part = f"{name}.{number:03d}"
        batch = journal.load_answers(part, known) if journal else None
        if batch is None and engine is None:
            raise CheckpointError(
                f"answers/{part}.jsonl is missing, and the weights that could write it again are "
                "gone: put the file back, or begin anew in another folder"
            )
        if batch is None:
            assert engine is not None
            batch = engine.generate(problems[start : start + per_batch], sampling)
            if journal:
                journal.save_answers(part, batch)
        yield batch


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
