"""Problem sets with what belongs to them: verifier, step splitter, oracle, templates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from selfteach.config.data_section import (
    AnswerReading,
    ChainSumsData,
    DataConfig,
    FilesData,
    GymData,
    HubData,
    LabData,
)
from selfteach.errors import DataError
from selfteach.protocols import Verifier
from selfteach.tasks import chain_sums, segmentation, verifiers
from selfteach.tasks.lab import lab_task as lab_task
from selfteach.tasks.lab.alignment_dial import partly_aligned
from selfteach.tasks.lab.world import World
from selfteach.tasks.lab.worlds import WORLDS, world_of
from selfteach.tasks.sources.audit import Audit, audit
from selfteach.tasks.sources.columns import with_mapping
from selfteach.tasks.sources.load import read_problem_sets
from selfteach.tasks.sources.reasoning_gym import generate
from selfteach.types import Blend, Critique, Problem

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
    split_steps: segmentation.Splitter
    oracle: OracleFn | None
    templates: str
    """The template set that suits these problems, unless the recipe names another."""
    form: verifiers.Form = field(default_factory=verifiers.Form)
    """How an answer to these problems is written, and when two of them are one."""
    blend: Blend | None = None
    """Puts a reference's steps in the place of a critique's, where the two can be told apart."""
    counts: Mapping[str, int] = field(default_factory=dict)
    """Rows read, and what was left out of the problem set, by reason."""

    def problems(self, split: Split) -> tuple[Problem, ...]:
        """One split. Raises `DataError` if it is empty."""
        chosen = {"train": self.train, "validation": self.validation, "test": self.test}[split]
        if not chosen:
            raise DataError(f"the {split} problem set is empty")
        return chosen


def load_task(config: DataConfig, model_folder: str, *, may_be_empty: bool = False) -> Task:
    """The task a recipe names. Raises `DataError` in one line for whatever is wrong with it.

    A task that ``may_be_empty`` needs no source: it only says how answers are read.
    """
    match config:
        case LabData():
            return _lab(config, model_folder)
        case ChainSumsData():
            return _chain_sums(config)
        case FilesData() | HubData():
            config = with_mapping(config)
            splits, counts = read_problem_sets(config, may_be_none=may_be_empty)
        case GymData():
            splits, counts = generate(config), {}
    world = config.world if isinstance(config, FilesData) else None
    kind = _kind(config.verifier, config, world, model_folder)
    train, validation, test = (tuple(splits[name]) for name in ("train", "validation", "test"))
    _check_meta(config.verifier, [*train, *validation, *test])
    task = Task(train, validation, test, counts=counts, **kind)
    return (
        task
        if config.invalid_problems == "warn"
        else _sound(task, drop=config.invalid_problems == "drop")
    )


def check_answers(task: Task) -> Audit:
    """Whether the task's verifier accepts every problem's own answer and rejects it corrupted."""
    return audit([*task.train, *task.validation, *task.test], task.verify, task.form.write)


def describe_problems(task: Task, *, most: int = 5) -> Iterator[str]:
    """Lines for a person: what was read and left out, and what the audit of the answers found."""
    if task.counts:
        yield "source: " + ", ".join(f"{count:,} {name}" for name, count in task.counts.items())
    found = check_answers(task)
    without = f", {found.without_answer:,} have none" if found.without_answer else ""
    yield (
        f"answers: {found.checked:,} tried{without}; the verifier misjudges "
        f"{len(found.invalid_problems):,} of the problems"
    )
    for finding in found.findings[:most]:
        yield f"warning: {finding}"
    if len(found.findings) > most:
        yield f"warning: and {len(found.findings) - most:,} more"
    if found.findings:
        yield 'data.invalid_problems = "drop" leaves such problems out, "stop" refuses to begin'


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


def _lab(config: LabData, model_folder: str) -> Task:
    world, below = _world(config.world, model_folder), config.max_solve_rate
    return Task(
        train=lab_task.problems(world, "train", config.train, max_solve_rate=below),
        validation=lab_task.problems(world, "validation", config.validation, max_solve_rate=below),
        test=lab_task.problems(world, "test", config.test, max_solve_rate=below),
        **_of_lab(world),
    )


def _of_lab(world: World) -> dict[str, Any]:
    return {
        "verify": lab_task.StepVerifier(world),
        "form": verifiers.Form(lab_task.write_answer),
        "split_steps": segmentation.lab,
        "oracle": lab_task.Oracle(world),
        "blend": partly_aligned,
        "templates": "lab",
    }


def _world(name: str | None, model_folder: str) -> World:
    if name is None:
        return world_of(model_folder)
    if name in WORLDS:
        return World(WORLDS[name])
    raise DataError(f"data.world = {name!r}: known worlds: {', '.join(WORLDS)}")


CHAIN_SUMS = {
    "verify": chain_sums.verify,
    "form": verifiers.Form(chain_sums.write_answer),
    "split_steps": chain_sums.split_spans,
    "oracle": chain_sums.criticise,
    "templates": "chain_sums",
}
"""What belongs to chain sums, as fields of a `Task`."""


def _chain_sums(config: ChainSumsData) -> Task:
    train, validation, test = chain_sums.problem_sets(
        seed=config.seed,
        min_terms=config.min_terms, max_terms=config.max_terms, max_digits=config.max_digits,
        train=config.train, validation=config.validation, test=config.test,
    )  # fmt: skip
    return Task(train, validation, test, **CHAIN_SUMS)


def _kind(
    verifier: str, reading: AnswerReading, world: str | None, model_folder: str
) -> dict[str, Any]:
    """What belongs to problems of one kind, as fields of a `Task`."""
    if verifier == "lab":
        return _of_lab(_world(world, model_folder))
    if verifier == "chain_sums":
        return dict(CHAIN_SUMS)
    judge, form = verifiers.build_verifier(verifier, reading.answer_in)
    return {
        "verify": judge,
        "form": form,
        "split_steps": segmentation.SPLITTERS[reading.steps],
        "oracle": None,
        "templates": "steps" if reading.steps == "tags" else "free",
    }


def _check_meta(verifier: str, problems: Sequence[Problem]) -> None:
    """Raises `DataError` for the first problem that lacks what its verifier or oracle reads."""
    needed = {"reasoning_gym": ("reasoning_gym",), "chain_sums": ("terms", "signs")}
    for problem in problems:
        for key in needed.get(verifier, ()):
            if key not in problem.meta:
                raise DataError(
                    f'data.verifier = "{verifier}": problem {problem.id!r} did not come from there; '
                    f"its meta has no {key!r}"
                )


def _sound(task: Task, *, drop: bool) -> Task:
    """The task without the problems its verifier cannot judge. Raises `DataError` unless they may
    be left out."""
    found = check_answers(task)
    if not found.findings:
        return task
    if not drop:
        raise DataError(
            f"{found.findings[0]}, and {len(found.invalid_problems) - 1} more problems are like it; "
            'data.invalid_problems = "drop" leaves them out'
        )
    kept = {
        name: tuple(p for p in getattr(task, name) if p.question not in found.invalid_problems)
        for name in ("train", "validation", "test")
    }
    return replace(
        task, **kept, counts={**task.counts, "invalid_problems": len(found.invalid_problems)}
    )
