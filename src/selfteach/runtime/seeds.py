"""Derives the random stream of each rollout."""

from __future__ import annotations

import hashlib

import numpy as np

from selfteach.types import Problem, Sampling


def stream_key(problem: Problem, sample: int, sampling: Sampling, version: int) -> int:
    """Return a 128-bit key unique to this rollout: by seed, problem, sample and policy version."""
    key = repr((sampling.seed, problem.id, sample, version)).encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=16).digest(), "little")


def hashed_rng(*key: int | str) -> np.random.Generator:
    """Return a generator seeded by the hash of a key, such as seed, problem id and sample."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return np.random.default_rng(int.from_bytes(digest, "little"))
