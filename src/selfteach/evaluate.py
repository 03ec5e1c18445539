"""Answers to a problem set, judged, and what they come to per problem."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from selfteach.distributed import ALONE, Ranks
from selfteach.estimates import avg_at_k, maj_at_k, pass_at_k
from selfteach.protocols import Engine, Verifier
from selfteach.run_folder import RunFolder, read_json
from selfteach.sampling import sample_batches
from selfteach.types import Problem, Rollout, Sampling, Verdict

RATES = ("avg", "pass", "maj", "truncated", "format")
"""Measures given in percent; ``length`` is in tokens."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """k judged answers to each of P problems; every list is [P][k]."""

    split: str
    step: int
    k: int
    problem_ids: list[str]
    correct: list[list[bool]]
    formatted: list[list[bool]]
    parsed: list[list[str | None]]
    finished: list[list[bool]]
    lengths: list[list[int]]

    def per_problem(self) -> dict[str, np.ndarray]:
        """avg, pass, maj, truncated and format in percent, length in tokens; each [P]."""
        correct_PK = np.array(self.correct, dtype=float)
        values = {
            "avg": avg_at_k(correct_PK),
            "pass": pass_at_k(correct_PK, self.k),
            "maj": maj_at_k(self.parsed, correct_PK),
            "truncated": 1 - np.array(self.finished, dtype=float).mean(1),
            "format": np.array(self.formatted, dtype=float).mean(1),
            "length": np.array(self.lengths, dtype=float).mean(1),
        }
        return {name: value * (100 if name in RATES else 1) for name, value in values.items()}

    def means(self) -> dict[str, float]:
        """The same, averaged over problems."""
        return {name: float(value.mean()) for name, value in self.per_problem().items()}

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Evaluation:
        """From `to_json`."""
        return cls(**data)


def evaluate(
    engine: Engine,
    verify: Verifier,
    problems: Sequence[Problem],
    sampling: Sampling,
    *,
    split: str = "problems",
    step: int = 0,
    batch_answers: int = 256,
    journal: RunFolder | None = None,
    same: Callable[[str, str], bool] = operator.eq,
    ranks: Ranks = ALONE,
) -> Evaluation:
    """Answer each problem ``sampling.samples`` times and judge the answers.

    ``same`` says when two final answers are one, so that a majority does not depend on spelling.
    Ranks share the work, and each returns the whole.
    """
    k = sampling.samples
    sampled = sample_batches(
        engine, problems, sampling, batch_answers=batch_answers,
        journal=journal, name=f"{split}_{step:06d}", ranks=ranks,
    )  # fmt: skip

    def own() -> list[tuple[Rollout, Verdict]]:
        return [(r, verify(r.problem, r.text)) for batch in sampled for r in batch]

    judged = ranks.gather(ranks.agreed(own))
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
        lengths=by_problem([len(rollout.answer_ids) for rollout in rollouts]),
    )


def evaluation_of(folder: Path, split: str, step: int) -> Evaluation:
    """An evaluation that a run has saved."""
    return Evaluation.from_json(read_json(evaluation_path(folder, split, step)))


def evaluation_path(folder: Path, split: str, step: int) -> Path:
    """Where a run keeps an evaluation."""
    return folder / "evaluations" / f"{split}_{step:06d}.json"


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
