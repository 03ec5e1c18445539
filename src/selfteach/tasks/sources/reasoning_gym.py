"""Generates problems with any generator of reasoning-gym; ``meta`` holds what its scorer needs."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from selfteach.config.data_section import GymData
from selfteach.config.schema import nearest
from selfteach.errors import DataError, RecipeError
from selfteach.tasks.sources.columns import MissingValue, column_value
from selfteach.tasks.sources.splits import Splits, hash_position, normalised
from selfteach.types import Problem

REFERENCES = {"gsm_symbolic": "answer_cot"}
"""Path of the worked solution in an entry's metadata, for generators that write one."""

TEMPLATES: dict[str, Callable[[Any, int], object]] = {
    "gsm_symbolic": lambda source, index: source.task_indices[index]
}
"""Returns the template of a generator's entry, of generators that fill templates and do not name them;
``metadata["template"]`` holds it."""

EXAMPLES = ("example_correct_answer", "example_answer", "possible_answer")
"""Metadata keys that hold one right answer, of generators of questions with many."""

TENTHS = {"test": (0.0, 0.1), "validation": (0.1, 0.2), "train": (0.2, 1.0)}
"""Ranges of `splits.hash_position` by split: no two splits share a question, or a value of
``data.split_by``, whatever the seed."""

DRAWS_PER_PROBLEM = 20
"""Entries drawn per requested problem before a generator counts as exhausted."""
MIN_DRAWS = 1000
"""Entries drawn at least before a generator counts as exhausted."""

SEED_STRIDE = 10**6
"""Distance between two seeds: a generator seeds entry i with seed + i."""


def generate(config: GymData) -> Splits:
    """Generate train, validation and test problems, the same for the same section.

    Raises `DataError` if the generator has too few distinct questions, `RecipeError` for a generator
    or a setting that does not exist.
    """
    sizes = {name: getattr(config, name) for name in TENTHS}
    splits: Splits = {name: [] for name in TENTHS}
    seen: set[str] = set()
    draws = max(MIN_DRAWS, DRAWS_PER_PROBLEM * sum(sizes.values()))
    source = _generator(config, draws)
    with _global_seed(config.seed):
        for index in range(draws):
            entry = source[index]
            if config.task in TEMPLATES:
                entry["metadata"]["template"] = TEMPLATES[config.task](source, index)
            words = normalised(entry["question"])
            position = hash_position(_split_key(config, entry), 0)
            split = next(name for name, (low, high) in TENTHS.items() if low <= position < high)
            if words in seen or len(splits[split]) == sizes[split]:
                continue
            seen.add(words)
            splits[split].append(_problem(config, entry, f"{split}-{len(splits[split])}"))
            if all(len(splits[name]) == size for name, size in sizes.items()):
                return splits
    what = "" if config.split_by is None else f", or another data.split_by than {config.split_by!r}"
    short = ", ".join(f"{len(splits[name])} of {size} {name}" for name, size in sizes.items())
    raise DataError(
        f"data.task = {config.task!r}: too few distinct questions ({short}); request fewer problems, "
        f"or change data.config{what}"
    )


def _split_key(config: GymData, entry: dict[str, Any]) -> str:
    """Return the text whose hash decides an entry's split: its question, or where it belongs."""
    if config.split_by is None:
        return str(entry["question"])
    group = _from_metadata(config, "split_by", config.split_by, entry["metadata"])
    return f"{config.task} {config.split_by} {group}"


def _from_metadata(config: GymData, key: str, path: str, metadata: dict[str, Any]) -> str:
    try:
        return str(column_value(metadata, path))
    except MissingValue as missing:
        raise RecipeError(f"data.{key} of {config.task!r}: {missing}") from None


def _problem(config: GymData, entry: dict[str, Any], name: str) -> Problem:
    metadata = json.loads(json.dumps(entry["metadata"], default=str))
    path = config.reference or REFERENCES.get(config.task)
    references = {}
    if path:
        references["reference"] = _from_metadata(config, "reference", path, metadata)
    gold = entry["answer"]
    if gold is None:
        gold = next((metadata[key] for key in EXAMPLES if metadata.get(key)), "")
    answer = gold if isinstance(gold, str) else json.dumps(gold, default=str)
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
            raise RecipeError(f"data.config.{key}: set data.seed, data.train, … instead")
        if key not in fields:
            raise RecipeError(f"data.config.{key} of {config.task!r}; {nearest(key, fields)}")
    settings = {"seed": config.seed * SEED_STRIDE, "size": size, **config.config}
    try:
        return create_dataset(config.task, **settings)
    except (AssertionError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise RecipeError(f"data.config of {config.task!r}: {reason}") from None


@contextmanager
def _global_seed(seed: int) -> Iterator[None]:
    """Seed Python's global random stream, which some generators draw from, and restore it after."""
    state = random.getstate()
    random.seed(seed)
    try:
        yield
    finally:
        random.setstate(state)
