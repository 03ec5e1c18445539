"""Critics: who marks an answer step by step."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from selfteach.tasks.task import OracleFn
from selfteach.types import Critique, CritiqueFailure, Rollout, Verdict


class OracleCritic:
    """A program that checks every step, and errs in a chosen share of its critiques."""

    def __init__(self, oracle: OracleFn, *, error_rate: float, seed: int) -> None:
        self._oracle, self._error_rate, self._seed = oracle, error_rate, seed

    def __call__(
        self, judged: Sequence[tuple[Rollout, Verdict]]
    ) -> list[Critique | CritiqueFailure]:
        """A critique of every answer; whether it errs depends on the answer's key alone."""
        return [
            self._oracle(
                rollout.problem,
                rollout.text,
                finished=rollout.finished,
                error_rate=self._error_rate,
                rng=self._stream(rollout),
            )
            for rollout, _ in judged
        ]

    def _stream(self, rollout: Rollout) -> np.random.Generator:
        key = repr((self._seed, rollout.problem.id, rollout.sample, rollout.policy_version))
        digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
        return np.random.default_rng(int.from_bytes(digest, "little"))
