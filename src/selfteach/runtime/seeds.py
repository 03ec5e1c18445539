"""Derives the random stream of each rollout."""

from __future__ import annotations

import hashlib

import numpy as np

from selfteach.types import Problem, Sampling


def stream_key(
    problem: Problem, sample: int, sampling: Sampling, version: int, turn: int = 0
) -> int:
    """Return a 128-bit key unique to this turn: by seed, problem, sample, policy version and turn."""
    key = (sampling.seed, problem.id, sample, version, *((turn,) if turn else ()))
    digest = hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
    return int.from_bytes(digest, "little")


def episode_seed(problem: Problem, sample: int, sampling: Sampling, version: int) -> int:
    """Return the seed of an episode's environment, which no random stream of the policy shares."""
    return stream_key(problem, sample, sampling, version, turn=-1) % 2**63


def hashed_rng(*key: int | str) -> np.random.Generator:
    """Return a generator seeded by the hash of a key, such as seed, problem id and sample."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return np.random.default_rng(int.from_bytes(digest, "little"))
