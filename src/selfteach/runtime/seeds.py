"""Which random stream is whose."""

from __future__ import annotations

import hashlib

from selfteach.types import Problem, Sampling


def stream_key(problem: Problem, sample: int, sampling: Sampling, version: int) -> int:
    """128 bits that only this answer has: by seed, question, sample and policy version."""
    key = repr((sampling.seed, problem.id, sample, version)).encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=16).digest(), "little")
