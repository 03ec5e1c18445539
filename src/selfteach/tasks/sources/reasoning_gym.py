"""Problems of any generator of reasoning-gym, with what its scorer needs in their ``meta``."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from selfteach.config.data_section import GymData
from selfteach.config.schema import nearest
from selfteach.errors import DataError, RecipeError
from selfteach.tasks.sources.columns import Missing, column_value
from selfteach.tasks.sources.splits import Splits, hash_position, normalised
from selfteach.types import Problem

REFERENCES = {"gsm_symbolic": "answer_cot"}
"""Where generators that write worked solutions keep them, in an entry's metadata."""

EXAMPLES = ("example_correct_answer", "example_answer", "possible_answer")
"""Where generators of questions with many right answers keep one of them."""

TENTHS = {"test": (0.0, 0.1), "validation": (0.1, 0.2), "train": (0.2, 1.0)}
"""Which places (`splits.hash_position`) belong to which split: whatever the seed, none shares a question."""

DRAWS_PER_PROBLEM = 20
FEWEST_DRAWS = 1000
"""Entries drawn before a generator counts as exhausted."""

SEED_STRIDE = 10**6
"""Between two seeds: a generator seeds entry i with seed + i."""


def generate(config: GymData) -> Splits:
    """Train, validation and test problems, the same for the same section.

    Raises `DataError` if the generator has too few distinct questions, `RecipeError` for a generator
    or a setting that does not exist.
    """
    wanted = {name: getattr(config, name) for name in TENTHS}
    found: Splits = {name: [] for name in TENTHS}
    seen: set[str] = set()
    draws = max(FEWEST_DRAWS, DRAWS_PER_PROBLEM * sum(wanted.values()))
    source = _generator(config, draws)
    with _global_seed(config.seed):
        for index in range(draws):
            entry = source[index]
            words = normalised(entry["question"])
            at = hash_position(entry["question"], 0)
            split = next(name for name, (low, high) in TENTHS.items() if low <= at < high)
            if words in seen or len(found[split]) == wanted[split]:
                continue
            seen.add(words)
            found[split].append(_problem(config, entry, f"{split}-{len(found[split])}"))
            if all(len(found[name]) == count for name, count in wanted.items()):
                return found
    short = ", ".join(f"{len(found[name])} of {count} {name}" for name, count in wanted.items())
    raise DataError(
        f"data.task = {config.task!r}: too few distinct questions ({short}); ask for fewer problems, "
        "or change data.config"
    )


def _problem(config: GymData, entry: dict[str, Any], name: str) -> Problem:
    metadata = json.loads(json.dumps(entry["metadata"], default=str))
    path = config.reference or REFERENCES.get(config.task)
    references = {}
    if path:
        try:
            references["reference"] = str(column_value(metadata, path))
        except Missing as missing:
            raise RecipeError(f"data.reference of {config.task!r}: {missing}") from None
    told = entry["answer"]
    if told is None:
        told = next((metadata[key] for key in EXAMPLES if metadata.get(key)), "")
    answer = told if isinstance(told, str) else json.dumps(told, default=str)
    source = {"task": config.task, "config": config.config, "metadata": metadata}
    return Problem(name, entry["question"], answer, references, {"reasoning_gym": source})


def _generator(config: GymData, size: int) -> Any:
    try:
        from reasoning_gym.factory import DATASETS, create_dataset
    except ImportError:
        raise DataError(
            'data.type = "reasoning_gym" needs reasoning-gym: pip install "selfteach[problems]"'
        ) from None
    if config.task not in DATASETS:
        raise RecipeError(f"data.task = {config.task!r}; {nearest(config.task, sorted(DATASETS))}")
    fields = [field.name for field in dataclasses.fields(DATASETS[config.task][1])]
    for key in config.config:
        if key in ("seed", "size"):
            raise RecipeError(f"data.config.{key}: say data.seed, data.train, data.validation, …")
        if key not in fields:
            raise RecipeError(f"data.config.{key} of {config.task!r}; {nearest(key, fields)}")
    settings = {"seed": config.seed * SEED_STRIDE, "size": size, **config.config}
    try:
        return create_dataset(config.task, **settings)
    except (AssertionError, TypeError, ValueError) as error:
        said = " ".join(str(error).split()) or type(error).__name__
        raise RecipeError(f"data.config of {config.task!r}: {said}") from None


@contextmanager
def _global_seed(seed: int) -> Iterator[None]:
    """Some generators draw from Python's global stream."""
    state = random.getstate()
    random.seed(seed)
    try:
        yield
    finally:
        random.setstate(state)
