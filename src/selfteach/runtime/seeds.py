"""Derives the random stream of each rollout."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

import numpy as np

from selfteach.types import Problem, Sampling

SeedBy = Literal["sample", "problem"]
"""What an environment's seed depends on: each episode has its own, or all of a problem the same."""


@dataclass(frozen=True, slots=True)
class EpisodeKey:
    """Names an episode among those of its problem, and with it the seed of its environment."""

    seed: int
    """Of the sampling settings."""
    sample: int
    version: int
    """Of the policy."""


def stream_key(
    problem: Problem, sample: int, sampling: Sampling, version: int, turn: int = 0
) -> int:
    """Return a 128-bit key unique to this turn: by seed, problem, sample, policy version and turn."""
    return _hashed(sampling.seed, problem.id, sample, version, *((turn,) if turn else ()))


def episode_seed(problem: Problem, key: EpisodeKey, by: SeedBy = "sample") -> int:
    """Return the seed of an episode's environment, which no random stream of the policy shares.

    By problem it depends on no sample and no version: each of its episodes is of the same task.
    """
    if by == "problem":
        return _hashed(key.seed, problem.id, "task") % 2**63
    return _hashed(key.seed, problem.id, key.sample, key.version, -1) % 2**63


def _hashed(*key: int | str) -> int:
    digest = hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
    return int.from_bytes(digest, "little")


def hashed_rng(*key: int | str) -> np.random.Generator:
    """Return a generator seeded by the hash of a key, such as seed, problem id and sample."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return np.random.default_rng(int.from_bytes(digest, "little"))
