"""Provides the lab as a task: its problem sets, its verifier and its oracle."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from itertools import islice

import numpy as np

from selfteach.tasks.lab import checker, lab_oracle
from selfteach.tasks.lab.corpus import references
from selfteach.tasks.lab.world import ANSWER_MARK, FLAG, ROOT, SplitName, World, WorldConfig
from selfteach.types import Critique, Problem, Verdict


def problems(
    world: World, split: SplitName, count: int, *, max_solve_rate: float = 1.0
) -> tuple[Problem, ...]:
    """Return the first ``count`` problems of a split; splits share no question.

    Only problems that a writer without a context solves with a probability below ``max_solve_rate``:
    the paper, too, keeps the problems on which its solver's Avg@16 is below 5/16.
    """
    return _problems(world.config, split, count, max_solve_rate)


@lru_cache(maxsize=16)  # runs of a study share their problem sets, many in one process
def _problems(
    config: WorldConfig, split: SplitName, count: int, max_solve_rate: float
) -> tuple[Problem, ...]:
    world = World(config)
    hard = (q for q in world.questions(split) if world.author_solve_rate(q) < max_solve_rate)
    return tuple(
        Problem(
            id=f"{split}-{index}",
            question=" ".join(question),
            answer=world.truth(question)[ROOT],
            references=references(world, question),
        )
        for index, question in enumerate(islice(hard, count))
    )


def verify(problem: Problem, text: str) -> Verdict:
    """Return the verdict on a text: right if the symbol after the answer mark is the gold answer."""
    parsed = checker.parse_answer(text)
    return Verdict(correct=parsed == problem.answer, formatted=parsed is not None, parsed=parsed)


def write_answer(answer: str) -> str:
    """Return the shortest text that states an answer."""
    return f"{ANSWER_MARK} {answer}"


class StepVerifier:
    """Verifies like `verify`, with feedback from the step checker in the lab's vocabulary.

    The feedback on a wrong answer names the first step that the checker rejects (``2 wrong`` is about
    node 2, ``! wrong`` about a step that does not parse), or else the final answer (``# wrong``).
    """

    def __init__(self, world: World) -> None:
        self._world = world

    def __call__(self, problem: Problem, text: str) -> Verdict:
        """Return the verdict; of a wrong answer with the place of the first error as feedback."""
        verdict = verify(problem, text)
        if verdict.correct:
            return verdict
        checked = checker.check(self._world, problem.question.split(), text)
        wrong = next((step for step in checked.steps if step.error), None)
        place = ANSWER_MARK if wrong is None else FLAG if wrong.line is None else wrong.line.node
        return replace(verdict, feedback=f"{place} wrong")


class Oracle:
    """Critiques one answer at a time with the step checker."""

    def __init__(self, world: World) -> None:
        self._world = world

    def __call__(
        self,
        problem: Problem,
        text: str,
        *,
        finished: bool,
        error_rate: float,
        rng: np.random.Generator,
    ) -> Critique:
        """Return the corrected trace of an answer; see `lab_oracle.critique_rollout`."""
        return lab_oracle.critique_rollout(
            self._world, problem.question.split(), text,
            finished=finished, error_rate=error_rate, rng=rng,
        )  # fmt: skip
