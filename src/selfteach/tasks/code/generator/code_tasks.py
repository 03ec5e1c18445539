"""Generates problems: a small function to write, its hidden tests, and worked solutions.

A question's text alone decides its split and its tests, so that no two splits share a question, and a
question has the same tests whatever the seed.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from selfteach.config.data_section import CodeTasksData, SplitName
from selfteach.errors import DataError
from selfteach.tasks.chain_sums import split_of
from selfteach.tasks.code.answer_code import write_code
from selfteach.tasks.code.code_oracle import SOLUTIONS
from selfteach.tasks.code.code_tests import KEY
from selfteach.tasks.code.generator.function_templates import (
    FunctionTask,
    FunctionTemplate,
    function_templates,
)
from selfteach.tasks.code.generator.random_inputs import arguments_of
from selfteach.types import Problem

NUM_TESTS = 10
CANDIDATES = 60
"""Inputs that are drawn for the tests of a question; different values are preferred."""
MAX_DRAWS_WITHOUT_NEW = 5_000
"""Questions drawn in a row of which none is needed before the generator counts as exhausted."""


def problem_sets(
    config: CodeTasksData,
) -> tuple[tuple[Problem, ...], tuple[Problem, ...], tuple[Problem, ...]]:
    """Generate train, validation and test problems, the same for the same section.

    Raises `DataError` for unknown functions, or if there are too few distinct questions.
    """
    sizes: dict[SplitName, int] = {
        "train": config.train, "validation": config.validation, "test": config.test,
    }  # fmt: skip
    splits: dict[SplitName, list[Problem]] = {split: [] for split in sizes}
    seen: set[str] = set()
    useless = 0
    for task in _drawn_tasks(_templates(config), config.seed):
        split = split_of(task.sentence)
        if task.sentence in seen or len(splits[split]) == sizes[split]:
            useless += 1
            if useless > MAX_DRAWS_WITHOUT_NEW:
                break
            continue
        seen.add(task.sentence)
        useless = 0
        splits[split].append(problem_of(task, f"{split}-{len(splits[split])}"))
        if all(len(splits[name]) == size for name, size in sizes.items()):
            return tuple(splits["train"]), tuple(splits["validation"]), tuple(splits["test"])
    short = ", ".join(f"{len(splits[name])} of {size} {name}" for name, size in sizes.items())
    raise DataError(
        f'data.type = "code_tasks": too few distinct questions ({short}): request fewer problems, or '
        "more levels or functions"
    )


def shared_templates(splits: Sequence[Sequence[Problem]]) -> str:
    """Return in a line how many templates the splits share, whose questions they do not."""
    train, *others = ({str(problem.meta["template"]) for problem in split} for split in splits)
    used, shared = train.union(*others), train.intersection(*others)
    return (
        f"{len(used)} templates of functions, {len(shared)} of them in every split; no question is"
    )


def problem_of(task: FunctionTask, name: str) -> Problem:
    """Return the problem of a task, with an example in its question that is none of the tests."""
    digest = hashlib.blake2b(task.sentence.encode(), digest_size=8).digest()
    rng = np.random.default_rng(int.from_bytes(digest, "big"))
    function = _function(task)
    example, cases = _cases(task, function, rng)
    shown = ", ".join(map(repr, example["args"]))
    question = (
        f"{task.sentence}\n\nFor example, `{task.template}({shown})` returns "
        f"`{example['value']!r}`."
    )
    first, *others = task.solutions
    return Problem(
        name,
        question,
        first,
        {"reference": write_code(others[-1]), "aligned_reference": write_code(first)},
        {
            KEY: {"shape": "cases", "cases": cases},
            SOLUTIONS: list(task.solutions),
            "template": task.template,
            "level": task.level,
        },
    )


def _templates(config: CodeTasksData) -> list[FunctionTemplate]:
    """Return the templates that a section asks for. Raises `DataError` if there are none."""
    templates = function_templates()
    known = {template.name for template in templates}
    if unknown := sorted(set(config.functions) - known):
        raise DataError(
            f"data.functions: no function {unknown[0]!r} is generated; there are "
            f"{', '.join(sorted(known))}"
        )
    if config.min_level > config.max_level:
        raise DataError(
            f"data.min_level = {config.min_level} is larger than data.max_level = {config.max_level}"
        )
    chosen = [
        template
        for template in templates
        if config.min_level <= template.level <= config.max_level
        and (not config.functions or template.name in config.functions)
    ]
    if not chosen:
        raise DataError(
            f"data.functions: none of them has a level from {config.min_level} to {config.max_level}"
        )
    return chosen


def _drawn_tasks(templates: Sequence[FunctionTemplate], seed: int) -> Iterator[FunctionTask]:
    """Yield tasks: each level as often as the others, and within it each template."""
    rng = np.random.default_rng([seed, 22])
    levels = sorted({template.level for template in templates})
    while True:
        for level in levels:
            of_level = [template for template in templates if template.level == level]
            yield of_level[int(rng.integers(len(of_level)))].filled(rng)


def _function(task: FunctionTask) -> Callable[..., Any]:
    """Return the function of the first solution: the package's text, and no model's."""
    space: dict[str, Any] = {}
    exec(compile(task.solutions[0], task.template, "exec", dont_inherit=True), space)
    return space[task.template]


def _cases(
    task: FunctionTask, function: Callable[..., Any], rng: np.random.Generator
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return an example, and tests: the smallest input, then inputs whose values differ."""
    drawn: dict[str, dict[str, Any]] = {}
    for index in range(CANDIDATES):
        arguments = arguments_of(task.inputs, rng, empty=index == 0)
        value = function(*copy.deepcopy(arguments))
        drawn.setdefault(json.dumps(arguments), {"args": arguments, "value": value})
    smallest, *rest = drawn.values()
    by_value: dict[str, list[dict[str, Any]]] = {}
    for one in rest:
        by_value.setdefault(json.dumps(one["value"]), []).append(one)
    rounds = max(map(len, by_value.values()))
    ordered = [group[i] for i in range(rounds) for group in by_value.values() if i < len(group)]
    example, *tests = ordered
    return example, [_case(task.template, one) for one in (smallest, *tests[: NUM_TESTS - 1])]


def _case(name: str, drawn: dict[str, Any]) -> dict[str, Any]:
    expected = json.loads(json.dumps(drawn["value"]))
    return {"call": name, "args": drawn["args"], "kwargs": {}, "expected": expected}
