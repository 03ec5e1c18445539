"""Evaluate an engine on a problem set."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

from selfteach.evaluation.evaluation_record import Evaluation
from selfteach.protocols import Engine, Reward, Verifier
from selfteach.runtime.distributed import SINGLE_PROCESS, Ranks
from selfteach.tasks.verifiers import verdicts_of
from selfteach.types import Problem, Rollout, Sampling, Verdict


def evaluate(
    engine: Engine,
    verify: Verifier,
    problems: Sequence[Problem],
    sampling: Sampling,
    *,
    split: str = "problems",
    step: int = 0,
    same: Callable[[str, str], bool] = operator.eq,
    ranks: Ranks = SINGLE_PROCESS,
    reward: Reward | None = None,
) -> Evaluation:
    """Sample ``sampling.samples`` rollouts of each problem and verify them.

    ``same`` returns whether two final answers are equal, so that a majority vote does not depend on
    spelling. A ``reward``, which gets all rollouts, says what is right. With several ranks the engine
    samples this rank's share, and every rank returns the full evaluation.
    """
    k = sampling.samples

    def verified() -> list[tuple[Rollout, Verdict]]:
        rollouts = engine.generate(problems, sampling)
        return list(zip(rollouts, verdicts_of(rollouts, verify, reward), strict=True))

    judged = ranks.gather(ranks.all_or_raise(verified))
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
        parsed=[merge_equal_answers(row, same) for row in by_problem([v.parsed for v in verdicts])],
        finished=by_problem([rollout.finished for rollout in rollouts]),
        lengths=by_problem([rollout.length for rollout in rollouts]),
        rewards=None if reward is None else by_problem([v.reward for v in verdicts]),
    )


def rollouts_name(split: str, step: int) -> str:
    """Return the name under which the rollouts of an evaluation are journaled."""
    return f"{split}_{step:06d}"


def merge_equal_answers(
    parsed: Sequence[str | None], same: Callable[[str, str], bool]
) -> list[str | None]:
    """Replace each final answer by the first equal one in the list; None (no answer) stays None."""
    firsts: list[str] = []
    votes: list[str | None] = []
    for answer in parsed:
        if answer is not None and answer not in firsts:
            answer = next((first for first in firsts if same(first, answer)), answer)
            if answer not in firsts:
                firsts.append(answer)
        votes.append(answer)
    return votes
