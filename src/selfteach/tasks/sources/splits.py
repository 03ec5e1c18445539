"""Splits a pool into train, validation and test; no question twice, none in two splits."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import replace

from selfteach.config.data_section import Splitting
from selfteach.errors import DataError
from selfteach.tasks.sources.columns import MissingValue, column_value
from selfteach.types import Problem

Splits = dict[str, list[Problem]]
"""Problems by the name of their split."""

INVISIBLE = re.compile("[\u00ad\u200b\u2060\ufeff]")
"""Matches characters without a width that part no letters: soft hyphens, byte order marks."""

PRECEDENCE = ("test", "validation", "train", "pool")
"""A question that is in two sources stays in the first of these."""


def normalised(question: str) -> str:
    """Normalise a question: white space, equivalent Unicode forms (NFC) and characters that no one
    sees make no difference.

    Case and compatibility forms do: ``A`` and ``a`` may be two variables, and 7² is not 72.
    """
    return " ".join(unicodedata.normalize("NFC", INVISIBLE.sub("", question)).split())


def turns_of(problem: Problem) -> str:
    """Return what decides a problem's split: its question and the turns before it, no system message.

    So the same question under two system messages is in one split.
    """
    turns = tuple((role, content) for role, content in problem.history if role != "system")
    return replace(problem, history=turns).transcript


def hash_position(question: str, seed: int) -> float:
    """Return a number in [0, 1): a hash of the question's words and the seed, and nothing else.

    Questions that differ in case or Unicode forms alone have the same position, so that shares put a
    question and its copy in capitals into the same split.
    """
    digest = hashlib.blake2b(f"{seed}\0{_folded(question)}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def spelled_alike(splits: Splits) -> int:
    """Count train questions that differ from one of validation or test by case or Unicode form alone.

    They are not removed: whether they are the same question cannot be known.
    """
    held_out = {
        _folded(turns_of(p)) for name in ("validation", "test") for p in splits.get(name, [])
    }
    return sum(_folded(turns_of(problem)) in held_out for problem in splits.get("train", []))


def _folded(question: str) -> str:
    visible = INVISIBLE.sub("", question)
    return " ".join(unicodedata.normalize("NFKC", visible).casefold().split())


def without_duplicates(problems: Iterable[Problem]) -> tuple[list[Problem], int]:
    """Return the first problem of each question, and the number of the others."""
    first: dict[str, Problem] = {}
    count = 0
    for problem in problems:
        count += 1
        first.setdefault(normalised(problem.transcript), problem)
    return list(first.values()), count - len(first)


def disjoint(splits: Splits) -> tuple[Splits, int]:
    """Remove questions shared between splits by `PRECEDENCE`; also return how many were removed."""
    seen: set[str] = set()
    unique: Splits = {}
    for name in PRECEDENCE:
        problems = splits.get(name, [])
        unique[name] = [p for p in problems if normalised(turns_of(p)) not in seen]
        seen |= {normalised(turns_of(p)) for p in problems}
    return unique, sum(map(len, splits.values())) - sum(map(len, unique.values()))


def split_pool(pool: Sequence[Problem], config: Splitting, *, named: Iterable[str] = ()) -> Splits:
    """Split one pool without duplicates into train, validation and test, each in the pool's order.

    Problems are ranked by `hash_position`, of the question or of the value that ``config.by`` names.
    With shares a position alone decides a problem's split; with counts the first are test, the next
    validation, and the rest (or its count) train; the rest of a value whose other problems a count has
    taken is in no split. Splits in ``named`` have a source and get none of the pool. Raises `DataError`
    if the pool is too small, or a problem has no such value.
    """
    names = ("test", "validation", "train")
    sizes = {name: 0 if name in named else getattr(config, name) for name in names}
    values = {problem.id: _split_value(problem, config.by) for problem in pool}
    assert len(values) == len(pool), "ids are checked before a pool is split"
    positions = {name: hash_position(value, config.seed) for name, value in values.items()}
    remaining = sorted(pool, key=lambda p: (positions[p.id], values[p.id], p.id))
    split_of: dict[str, str] = {}
    until = 0.0
    for name, size in sizes.items():
        if isinstance(size, float):
            until += size
            taken = [problem for problem in remaining if positions[problem.id] < until]
        else:
            taken = remaining[:size]
        if isinstance(size, int) and len(taken) < size:
            requested = ", ".join(f"{size} {name}" for name, size in sizes.items() if size)
            by = f", split by {config.by}" if config.by else ""
            raise DataError(f"{len(pool)} problems are too few for {requested}{by}: request fewer")
        split_of |= {problem.id: name for problem in taken}
        used = {values[problem.id] for problem in taken} if config.by else set()
        remaining = [p for p in remaining[len(taken) :] if values[p.id] not in used]
    return {name: [p for p in pool if split_of.get(p.id) == name] for name in names}


def _split_value(problem: Problem, path: str | None) -> str:
    """Return the text whose hash decides a problem's split. Raises `DataError` if it has none."""
    if path is None:
        return turns_of(problem)
    row = {**problem.columns, "question": problem.question, "meta": problem.meta}
    try:
        return f"{path} {column_value(row, path)}"
    except MissingValue as missing:
        raise DataError(f"problem {problem.label!r}: split.by: {missing}") from None
