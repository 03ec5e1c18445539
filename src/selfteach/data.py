"""Problem sets with what belongs to them: verifier, step splitter, oracle, templates."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import numpy as np

from selfteach import chain_sums, steps, verifiers
from selfteach.config import ChainSumsData, DataConfig, JsonlData, LabData
from selfteach.errors import DataError
from selfteach.lab import task as lab_task
from selfteach.lab.world import World
from selfteach.lab.worlds import WORLDS, world_of
from selfteach.protocols import Verifier
from selfteach.types import Critique, Problem

Split = Literal["train", "validation", "test"]


@runtime_checkable
class OracleFn(Protocol):
    """A program that can check every step of an answer to its own kind of problem."""

    def __call__(
        self,
        problem: Problem,
        text: str,
        *,
        finished: bool,
        error_rate: float,
        rng: np.random.Generator,
    ) -> Critique:
        """The corrected trace of an answer."""
        ...


@dataclass(frozen=True, slots=True)
class Task:
    """Problems by split, and how their answers are read."""

    train: tuple[Problem, ...]
    validation: tuple[Problem, ...]
    test: tuple[Problem, ...]
    verify: Verifier
    split_steps: steps.Splitter
    oracle: OracleFn | None
    templates: str
    """The template set that suits these problems, unless the recipe names another."""

    def problems(self, split: Split) -> tuple[Problem, ...]:
        """One split. Raises `DataError` if it is empty."""
        chosen = {"train": self.train, "validation": self.validation, "test": self.test}[split]
        if not chosen:
            raise DataError(f"the {split} problem set is empty")
        return chosen


def load_task(config: DataConfig, model_folder: str) -> Task:
    """The task a recipe names. Raises `DataError` in one line for whatever is wrong with it."""
    match config:
        case LabData():
            return _lab(config, model_folder)
        case ChainSumsData():
            return _chain_sums(config)
        case JsonlData():
            return _jsonl(config)


def read_jsonl(path: Path) -> tuple[Problem, ...]:
    """Problems from JSON lines with ``question`` and ``answer``; ``id`` and ``reference`` if given.

    Raises `DataError` naming the line for anything else.
    """
    try:
        rows = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise DataError(f"{path}: no such problem set") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    problems = []
    for number, row in enumerate(rows, start=1):
        if row.strip():
            problems.append(_problem(row, f"{path}:{number}", f"{path.stem}-{number}"))
    if not problems:
        raise DataError(f"{path}: the problem set is empty")
    if len({problem.id for problem in problems}) < len(problems):
        raise DataError(f"{path}: two problems have the same id")
    return tuple(problems)


def training_order(count: int, seed: int, problems_per_step: int) -> Iterator[list[int]]:
    """Indices of each step's problems: one shuffled pass after another, the same for every arm.

    A step never holds a problem twice. Resuming is starting anew and skipping what is done: the
    order depends on nothing but its arguments.
    """
    rng = np.random.default_rng([seed, 7])
    waiting: list[int] = []
    per_step = min(problems_per_step, count)
    while True:
        while len(waiting) < per_step:
            held = set(waiting)
            waiting += [int(i) for i in rng.permutation(count) if int(i) not in held]
        yield waiting[:per_step]
        waiting = waiting[per_step:]


def _problem(row: str, where: str, default_id: str) -> Problem:
    try:
        fields = json.loads(row)
        question, answer = str(fields["question"]), str(fields["answer"])
    except (ValueError, TypeError):
        raise DataError(f"{where}: not a JSON object") from None
    except KeyError as missing:
        raise DataError(f"{where}: no field {missing}; needed: question, answer") from None
    if not question.strip():
        raise DataError(f"{where}: the question is empty")
    references = {k: str(fields[k]) for k in ("reference", "aligned_reference") if fields.get(k)}
    return Problem(str(fields.get("id", default_id)), question, answer, references)


def _lab(config: LabData, model_folder: str) -> Task:
    if config.world is None:
        world = world_of(model_folder)
    elif config.world in WORLDS:
        world = World(WORLDS[config.world])
    else:
        raise DataError(f"data.world = {config.world!r}: known worlds: {', '.join(WORLDS)}")
    below = config.chance_below
    return Task(
        train=lab_task.problems(world, "train", config.train, chance_below=below),
        validation=lab_task.problems(world, "validation", config.validation, chance_below=below),
        test=lab_task.problems(world, "test", config.test, chance_below=below),
        verify=lab_task.StepVerifier(world),
        split_steps=steps.lab,
        oracle=lab_task.Oracle(world),
        templates="lab",
    )


def _chain_sums(config: ChainSumsData) -> Task:
    train, validation, test = chain_sums.problem_sets(
        seed=config.seed,
        min_terms=config.min_terms, max_terms=config.max_terms, max_digits=config.max_digits,
        train=config.train, validation=config.validation, test=config.test,
    )  # fmt: skip
    return Task(
        train, validation, test,
        verify=chain_sums.verify,
        split_steps=chain_sums.split_spans,
        oracle=chain_sums.criticise,
        templates="chain_sums",
    )  # fmt: skip


def _jsonl(config: JsonlData) -> Task:
    def read(path: str | None) -> tuple[Problem, ...]:
        return read_jsonl(Path(path)) if path else ()

    compare: dict[str, Callable[[], Verifier]] = {
        "exact": lambda: verifiers.exact,
        "math": verifiers.math,
    }
    return Task(
        read(config.train), read(config.validation), read(config.test),
        verify=compare[config.verifier](),
        split_steps=steps.SPLITTERS[config.steps],
        oracle=None,
        templates="steps" if config.steps == "tags" else "free",
    )  # fmt: skip


def known_ids(problems: Sequence[Problem]) -> dict[str, Problem]:
    """Problems by id."""
    return {problem.id: problem for problem in problems}
