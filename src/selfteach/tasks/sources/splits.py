"""One pool into train, validation and test; no question twice, none in two splits."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterable, Sequence

from selfteach.config.data_section import Splitting
from selfteach.errors import DataError
from selfteach.types import Problem

Splits = dict[str, list[Problem]]

PRECEDENCE = ("test", "validation", "train", "pool")
"""A question that stands in two sources stays in the first of these."""


def normalised(question: str) -> str:
    """A question by its words: case, white space and the forms of Unicode characters don't count."""
    return " ".join(unicodedata.normalize("NFKC", question).casefold().split())


def hash_position(question: str, seed: int) -> float:
    """Where a question stands in [0, 1): a hash of its words and the seed, and nothing else."""
    digest = hashlib.blake2b(f"{seed}\0{normalised(question)}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def without_duplicates(problems: Iterable[Problem]) -> tuple[list[Problem], int]:
    """The first problem of each question, and how many others there were."""
    first: dict[str, Problem] = {}
    count = 0
    for problem in problems:
        count += 1
        first.setdefault(normalised(problem.question), problem)
    return list(first.values()), count - len(first)


def disjoint(splits: Splits) -> tuple[Splits, int]:
    """Splits that share no question, and how many problems left one for that; see `PRECEDENCE`."""
    seen: set[str] = set()
    kept: Splits = {}
    for name in PRECEDENCE:
        here = splits.get(name, [])
        kept[name] = [p for p in here if normalised(p.question) not in seen]
        seen |= {normalised(p.question) for p in here}
    return kept, sum(map(len, splits.values())) - sum(map(len, kept.values()))


def split_pool(pool: Sequence[Problem], how: Splitting, *, named: Iterable[str] = ()) -> Splits:
    """Train, validation and test from one pool without duplicates, each in the pool's order.

    Problems are ranked by `hash_position`. With shares a question goes where its place says; with counts the
    first are test, the next validation, and the rest (or its count) train. Splits ``named`` have a
    source of their own and get nothing here. Raises `DataError` if there are too few.
    """
    names = ("test", "validation", "train")
    sizes = {name: 0 if name in named else getattr(how, name) for name in names}
    places = {problem.id: hash_position(problem.question, how.seed) for problem in pool}
    assert len(places) == len(pool), "ids are checked before a pool is split"
    waiting = sorted(pool, key=lambda problem: (places[problem.id], problem.id))
    chosen: dict[str, str] = {}
    until = 0.0
    for name, size in sizes.items():
        if isinstance(size, float):
            until += size
            taken = [problem for problem in waiting if places[problem.id] < until]
        else:
            taken = waiting[:size]
        if isinstance(size, int) and len(taken) < size:
            asked = ", ".join(f"{size} {name}" for name, size in sizes.items() if size)
            raise DataError(f"{len(pool)} problems are too few for {asked}: ask for fewer")
        chosen |= {problem.id: name for problem in taken}
        waiting = waiting[len(taken) :]
    return {name: [p for p in pool if chosen.get(p.id) == name] for name in names}
