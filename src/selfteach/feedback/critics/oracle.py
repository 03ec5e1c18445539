"""Critiques rollouts with a program that checks every step."""

from __future__ import annotations

from collections.abc import Sequence

from selfteach.runtime.seeds import hashed_rng
from selfteach.tasks.task import Oracle, true_critique
from selfteach.types import Critique, CritiqueFailure, Rollout, Verdict


class OracleCritic:
    """Critiques with a program; ``error_rate`` is the share of critiques that get a wrong step."""

    def __init__(self, oracle: Oracle, *, error_rate: float, seed: int) -> None:
        self._oracle, self._error_rate, self._seed = oracle, error_rate, seed

    def __call__(
        self, judged: Sequence[tuple[Rollout, Verdict]]
    ) -> list[Critique | CritiqueFailure]:
        """Return a critique per rollout; whether it errs depends on the rollout's key alone."""
        return [
            true_critique(
                self._oracle,
                rollout,
                error_rate=self._error_rate,
                rng=hashed_rng(
                    self._seed, rollout.problem.id, rollout.sample, rollout.policy_version
                ),
            )
            for rollout, _ in judged
        ]
