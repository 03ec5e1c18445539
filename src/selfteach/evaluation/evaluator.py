"""Answers to a problem set, judged."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

from selfteach.evaluation.evaluation_record import Evaluation
from selfteach.protocols import Engine, Verifier
from selfteach.rollout.rollouts import sample_batches
from selfteach.runtime.distributed import SINGLE_PROCESS, Ranks
from selfteach.runtime.run_folder import RunFolder
from selfteach.types import Problem, Rollout, Sampling, Verdict


def evaluate(
    engine: Engine,
    verify: Verifier,
    problems: Sequence[Problem],
    sampling: Sampling,
    *,
    split: str = "problems",
    step: int = 0,
    batch_size: int = 256,
    journal: RunFolder | None = None,
    same: Callable[[str, str], bool] = operator.eq,
    ranks: Ranks = SINGLE_PROCESS,
) -> Evaluation:
    """Answer each problem ``sampling.samples`` times and judge the answers.

    ``same`` says when two final answers are one, so that a majority does not depend on spelling.
    Ranks share the work, and each returns the whole.
    """
    k = sampling.samples
    sampled = sample_batches(
        engine, problems, sampling, batch_size=batch_size,
        journal=journal, name=rollouts_name(split, step), ranks=ranks,
    )  # fmt: skip

    def own() -> list[tuple[Rollout, Verdict]]:
        return [(r, verify(r.problem, r.text)) for batch in sampled for r in batch]

    judged = ranks.gather(ranks.all_or_raise(own))
    rollouts, verdicts = [rollout for rollout, _ in judged], [verdict for _, verdict in judged]

    def by_problem(values: Sequence[Any]) -> list[list[Any]]:
        return [list(values[i : i + k]) for i in range(0, len(values), k)]

    return Evaluation(
        split=split,
        step=step,
        k=k,
        problem_ids=[problem.id for problem in problems],
        correct=by_problem([verdict.correct for verdict in verdicts]),
        formatted=by_problem([verdict.formatted for verdict in verdicts]),
        parsed=[one_vote(row, same) for row in by_problem([v.parsed for v in verdicts])],
        finished=by_problem([rollout.finished for rollout in rollouts]),
        lengths=by_problem([len(rollout.token_ids) for rollout in rollouts]),
    )


def rollouts_name(split: str, step: int) -> str:
    """Under which the answers of an evaluation are kept, batch by batch."""
    return f"{split}_{step:06d}"


def one_vote(parsed: Sequence[str | None], same: Callable[[str, str], bool]) -> list[str | None]:
    """Each answer as the first of the row that is the same; None is no vote and stays."""
    firsts: list[str] = []
    votes: list[str | None] = []
    for answer in parsed:
        if answer is not None and answer not in firsts:
            answer = next((first for first in firsts if same(first, answer)), answer)
            if answer not in firsts:
                firsts.append(answer)
        votes.append(answer)
    return votes
