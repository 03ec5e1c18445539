"""Answers to many problems, batch by batch, each batch on disk before it is used."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from selfteach.data import known_ids
from selfteach.distributed import ALONE, Ranks
from selfteach.protocols import Engine
from selfteach.run_folder import RunFolder
from selfteach.types import Problem, Rollout, Sampling


def sample_batches(
    engine: Engine,
    problems: Sequence[Problem],
    sampling: Sampling,
    *,
    batch_answers: int,
    journal: RunFolder | None = None,
    name: str = "",
    ranks: Ranks = ALONE,
) -> Iterator[list[Rollout]]:
    """``sampling.samples`` answers to each problem; with a journal, none that it already holds.

    Batches hold whole problems and at most ``batch_answers`` answers (or one problem). A resumed run
    forms the same batches, so its answers are the same to the last bit. Each rank samples its share of
    the batches, which are those of one rank: a run may go on with another number of them.
    """
    per_batch = max(1, batch_answers // sampling.samples)
    known = known_ids(problems)
    batches = list(enumerate(range(0, len(problems), per_batch)))
    for number, start in ranks.share(batches):
        part = f"{name}.{number:03d}"
        batch = journal.load_answers(part, known) if journal else None
        if batch is None:
            batch = engine.generate(problems[start : start + per_batch], sampling)
            if journal:
                journal.save_answers(part, batch)
        yield batch
