"""Loads the task of a recipe: problem sets with their verifier, step splitter, oracle and templates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np

from selfteach.config.code_section import CodeConfig
from selfteach.config.data_section import (
    AnswerReading,
    ChainSumsData,
    CodeTasksData,
    CustomData,
    DataConfig,
    EnvironmentData,
    FilesData,
    GymData,
    HubData,
    LabData,
    RowsData,
    SplitName,
)
from selfteach.config.part_section import CustomPart
from selfteach.config.reward_section import RewardConfig
from selfteach.errors import DataError
from selfteach.protocols import Verifier
from selfteach.tasks import chain_sums, segmentation, verifiers
from selfteach.tasks.code.code_oracle import CodeOracle
from selfteach.tasks.code.code_tests import KEY
from selfteach.tasks.code.code_verifier import CodeVerifier
from selfteach.tasks.code.generator import code_tasks
from selfteach.tasks.custom_tasks import custom_functions, custom_problems
from selfteach.tasks.hub_environments.environment_problems import HubEnvironment, read_environment
from selfteach.tasks.lab import lab_task as lab_task
from selfteach.tasks.lab.alignment_dial import partly_aligned
from selfteach.tasks.lab.world import World
from selfteach.tasks.lab.worlds import WORLDS, world_of
from selfteach.tasks.sources.audit import Audit, audit
from selfteach.tasks.sources.columns import with_mapping
from selfteach.tasks.sources.load import combined, read_problem_sets
from selfteach.tasks.sources.reasoning_gym import generate
from selfteach.types import Critique, CritiqueFailure, Problem, ReplaceSteps, Rollout

ReadData = FilesData | HubData | GymData | EnvironmentData | CustomData
"""Sections of problems that are read or imported, and not generated here."""


@runtime_checkable
class OracleFn(Protocol):
    """Critiques an answer with a program that can check every step of this kind of problem."""

    def __call__(
        self,
        problem: Problem,
        text: str,
        *,
        finished: bool,
        error_rate: float,
        rng: np.random.Generator,
    ) -> Critique | CritiqueFailure:
        """Return the corrected trace of an answer, or why it has none."""
        ...


@runtime_checkable
class EpisodeOracle(Protocol):
    """Critiques an episode with a program that can check every turn."""

    def critique_episode(
        self, rollout: Rollout, *, error_rate: float, rng: np.random.Generator
    ) -> Critique:
        """Return the corrected turns of an episode, without the replies to them."""
        ...


Oracle = OracleFn | EpisodeOracle
"""A program that critiques answers, or one that critiques episodes."""


def true_critique(
    oracle: Oracle, rollout: Rollout, *, error_rate: float = 0.0, rng: np.random.Generator
) -> Critique | CritiqueFailure:
    """Return an oracle's critique of a rollout, or why it has none."""
    if isinstance(oracle, EpisodeOracle):
        return oracle.critique_episode(rollout, error_rate=error_rate, rng=rng)
    return oracle(
        rollout.problem, rollout.text, finished=rollout.finished, error_rate=error_rate, rng=rng
    )


@dataclass(frozen=True, slots=True)
class Task:
    """Holds problems by split, with the functions that verify, split and critique their answers."""

    train: tuple[Problem, ...]
    validation: tuple[Problem, ...]
    test: tuple[Problem, ...]
    verify: Verifier
    split_steps: segmentation.Splitter
    oracle: Oracle | None
    templates: str
    """The template set to use unless the recipe names another."""
    answer_format: verifiers.AnswerFormat = field(default_factory=verifiers.AnswerFormat)
    """How a final answer to these problems is written, and when two are equivalent."""
    replace_steps: ReplaceSteps | None = None
    """Replaces some of a critique's steps by the reference's; None where steps cannot be matched."""
    counts: Mapping[str, int] = field(default_factory=dict)
    """Number of rows read, and of rows left out of the problem set by reason."""
    columns: str = ""
    """Which columns of the rows were read for what, in one line; empty where there are no rows."""
    about: str = ""
    """What a person should know of generated problems, in one line."""
    environment: HubEnvironment | None = None
    """The environment of `verifiers` that the problems are from, whose rewards they have."""

    def problems(self, split: SplitName) -> tuple[Problem, ...]:
        """Return the problems of one split. Raises `DataError` if it is empty."""
        chosen = {"train": self.train, "validation": self.validation, "test": self.test}[split]
        if not chosen:
            raise DataError(f"the {split} problem set is empty")
        return chosen


def load_task(
    config: DataConfig,
    model_folder: str,
    *,
    allow_empty: bool = False,
    reward: RewardConfig | None = None,
    episodes: bool = False,
) -> Task:
    """Load the task that a recipe names. Raises `DataError`, in one line, if it cannot be loaded.

    With ``allow_empty`` the recipe needs no source of problems: the task only says how answers are
    read. With a ``reward`` problems have the columns of their rows, and where it needs no answers they
    may have none. With ``episodes`` an environment of `verifiers` runs these too (`Recipe`).
    """
    match config:
        case LabData():
            return _lab(config, model_folder)
        case ChainSumsData():
            return _chain_sums(config)
        case CodeTasksData():
            return _code_tasks(config)
        case FilesData() | HubData():
            config = with_mapping(config)
        case _:
            pass
    need_answers = reward is None or reward.needs_answers
    if isinstance(config, EnvironmentData) and config.verifier is None:
        need_answers = False
    fields = _read_problems(
        config, allow_empty, reward is not None, need_answers, episodes=episodes
    )
    verifier, functions = _verifier_and_functions(config, model_folder)
    if not need_answers and verifier != "code":
        functions["verify"] = verifiers.WithoutAnswers(functions["verify"])
    _check_meta(verifier, [*fields["train"], *fields["validation"], *fields["test"]])
    if "environment" in fields:
        functions["templates"] = "bare"  # its prompts bring their instructions
    task = Task(**fields, **functions)
    if config.invalid_problems == "warn":
        return task
    return _only_valid(task, drop=config.invalid_problems == "drop")


def _read_problems(
    config: ReadData, allow_no_source: bool, keep_rows: bool, need_answers: bool, *, episodes: bool
) -> dict[str, Any]:
    """Return a `Task`'s problems, and what was read to get them, as fields of it."""
    fields: dict[str, Any] = {}
    match config:
        case FilesData() | HubData():
            splits, fields["counts"], fields["columns"] = read_problem_sets(
                config,
                allow_no_source=allow_no_source,
                keep_rows=keep_rows,
                need_answers=need_answers,
            )
        case GymData():
            splits = generate(config)
        case EnvironmentData():
            fields["environment"], splits, fields["counts"], fields["columns"] = read_environment(
                config, need_answers=need_answers, episodes=episodes
            )
        case CustomData():
            read = custom_problems(config, need_answers=need_answers)
            splits, fields["counts"], fields["columns"] = combined(*read)
    return fields | {name: tuple(splits[name]) for name in ("train", "validation", "test")}


def _verifier_and_functions(config: ReadData, model_folder: str) -> tuple[str, dict[str, Any]]:
    """Return the name of the verifier that is read for, and the functions of a `Task`."""
    world = config.world if isinstance(config, FilesData) else None
    named = config.verifier
    verifier = "exact" if named is None or isinstance(named, CustomPart) else named
    functions = _functions_of(verifier, config, world, model_folder)
    return verifier, custom_functions(config, functions)


def check_answers(task: Task) -> Audit:
    """Check that the verifier accepts every problem's gold answer and rejects corruptions of it."""
    problems, form = [*task.train, *task.validation, *task.test], task.answer_format
    return audit(problems, task.verify, form.write, form.corrupted)


def describe_problems(task: Task, *, max_warnings: int = 5) -> Iterator[str]:
    """Yield lines for a person: rows read and left out, and the result of `check_answers`."""
    if task.counts:
        yield "source: " + ", ".join(f"{count:,} {name}" for name, count in task.counts.items())
    if task.columns:
        yield f"columns: {task.columns}"
    if task.about:
        yield task.about
    if isinstance(task.verify, CodeVerifier):
        yield task.verify.description
    result = check_answers(task)
    without = f", {result.without_answer:,} have none" if result.without_answer else ""
    yield (
        f"answers: {result.checked:,} tried{without}; the verifier misjudges "
        f"{len(result.invalid_problems):,} of the problems"
    )
    for finding in result.findings[:max_warnings]:
        yield f"warning: {finding}"
    if len(result.findings) > max_warnings:
        yield f"warning: and {len(result.findings) - max_warnings:,} more"
    if result.findings:
        yield 'data.invalid_problems = "drop" leaves such problems out, "stop" refuses to start'


def training_order(
    count: int, seed: int, problems_per_step: int, *, uneven: bool = False
) -> Iterator[list[int]]:
    """Yield the problem indices of each training step: shuffled epochs, the same for every arm.

    Every epoch holds each problem once, so that the numbers of uses never differ by more than one. No
    step holds a problem twice: in a step across two epochs, the later epoch's problems are moved back
    where the earlier one's are in the step already. The order depends on the arguments alone, so a
    resumed run iterates from the start and skips the finished steps. ``uneven`` is the order of earlier
    versions, whose runs are resumed in it: an epoch left out what the step before it held.
    """
    rng = np.random.default_rng([seed, 7])
    queue: list[int] = []
    per_step = min(problems_per_step, count)
    while True:
        while len(queue) < per_step:
            epoch, missing = rng.permutation(count).tolist(), per_step - len(queue)
            queued = set(queue)
            first = [i for i in epoch if i not in queued][:missing]
            moved_back = set(epoch).difference(first, queued if uneven else ())
            queue += [*first, *(i for i in epoch if i in moved_back)]
        yield queue[:per_step]
        queue = queue[per_step:]


def _lab(config: LabData, model_folder: str) -> Task:
    world, limit = _world(config.world, model_folder), config.max_solve_rate
    return Task(
        train=lab_task.problems(world, "train", config.train, max_solve_rate=limit),
        validation=lab_task.problems(world, "validation", config.validation, max_solve_rate=limit),
        test=lab_task.problems(world, "test", config.test, max_solve_rate=limit),
        **custom_functions(config, _lab_functions(world)),
    )


def _lab_functions(world: World) -> dict[str, Any]:
    return {
        "verify": lab_task.StepVerifier(world),
        "answer_format": verifiers.AnswerFormat(lab_task.write_answer),
        "split_steps": segmentation.lab,
        "oracle": lab_task.Oracle(world),
        "replace_steps": partly_aligned,
        "templates": "lab",
    }


def _world(name: str | None, model_folder: str) -> World:
    if name is None:
        return world_of(model_folder)
    if name in WORLDS:
        return World(WORLDS[name])
    raise DataError(f"data.world = {name!r}: no such world; known worlds: {', '.join(WORLDS)}")


CHAIN_SUMS = {
    "verify": chain_sums.verify,
    "answer_format": verifiers.AnswerFormat(chain_sums.write_answer),
    "split_steps": chain_sums.split_spans,
    "oracle": chain_sums.critique_rollout,
    "templates": "chain_sums",
}
"""The functions of chain sums, as fields of a `Task`."""


def _chain_sums(config: ChainSumsData) -> Task:
    train, validation, test = chain_sums.problem_sets(
        seed=config.seed,
        min_terms=config.min_terms, max_terms=config.max_terms, max_digits=config.max_digits,
        train=config.train, validation=config.validation, test=config.test,
    )  # fmt: skip
    return Task(train, validation, test, **custom_functions(config, CHAIN_SUMS))


def _code_tasks(config: CodeTasksData) -> Task:
    splits = code_tasks.problem_sets(config)
    functions = _functions_of("code", AnswerReading(), None, "", config.code)
    about = code_tasks.shared_templates(splits)
    return Task(*splits, **custom_functions(config, functions), about=about)


def _functions_of(
    verifier: str,
    reading: AnswerReading,
    world: str | None,
    model_folder: str,
    code: CodeConfig | None = None,
) -> dict[str, Any]:
    """Return the functions that belong to a verifier, as fields of a `Task`."""
    if verifier == "lab":
        return _lab_functions(_world(world, model_folder))
    if verifier == "chain_sums":
        return dict(CHAIN_SUMS)
    code = reading.code if isinstance(reading, RowsData | CustomData) else code
    verify, answer_format = verifiers.build_verifier(verifier, reading.answer_in, code)
    steps = "lines" if isinstance(reading.steps, CustomPart) else reading.steps
    if verifier == "code" and (steps == "tags" or isinstance(reading.steps, CustomPart)):
        steps = "code"
    return {
        "verify": verify,
        "answer_format": answer_format,
        "split_steps": segmentation.SPLITTERS[steps],
        "oracle": CodeOracle(verify) if isinstance(verify, CodeVerifier) else None,
        "templates": "code" if verifier == "code" else "steps" if steps == "tags" else "free",
    }


def _check_meta(verifier: str, problems: Sequence[Problem]) -> None:
    """Raise `DataError` for the first problem whose meta lacks what its verifier or oracle reads."""
    needed = {"reasoning_gym": ("reasoning_gym",), "chain_sums": ("terms", "signs"), "code": (KEY,)}
    for problem in problems:
        for key in needed.get(verifier, ()):
            if key not in problem.meta:
                raise DataError(
                    f'data.verifier = "{verifier}": problem {problem.label!r} is not from that source; '
                    f"its meta has no {key!r}"
                )


def _only_valid(task: Task, *, drop: bool) -> Task:
    """Remove the problems that the verifier misjudges. Raises `DataError` unless ``drop``."""
    result = check_answers(task)
    if not result.findings:
        return task
    if not drop:
        raise DataError(
            f"{result.findings[0]}; {len(result.invalid_problems) - 1} more problems are invalid; "
            'data.invalid_problems = "drop" leaves them out'
        )
    invalid = result.invalid_problems
    valid = {
        name: tuple(p for p in getattr(task, name) if p.transcript not in invalid)
        for name in ("train", "validation", "test")
    }
    return replace(task, **valid, counts={**task.counts, "invalid_problems": len(invalid)})


def default_templates(config: DataConfig) -> str | None:
    """Return the template set of a kind of data without loading it; None if it must be loaded."""
    match config:
        case LabData():
            return "lab"
        case ChainSumsData():
            return "chain_sums"
        case CodeTasksData():
            return "code"
        case EnvironmentData():
            return "bare"
        case FilesData() | HubData() | GymData():
            if config.verifier in ("lab", "chain_sums", "code"):
                return str(config.verifier)
            return "steps" if config.steps == "tags" else "free"
        case _:
            return None
