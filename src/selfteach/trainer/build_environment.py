"""Builds the environment of a recipe from its ``[environment]`` section."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from selfteach.config.code_section import CodeConfig
from selfteach.config.environment_section import (
    CalculatorEnvironmentConfig,
    CustomEnvironmentConfig,
    EnvironmentConfig,
    OpenEnvEnvironmentConfig,
    PythonEnvironmentConfig,
    VerifiersEnvironmentConfig,
)
from selfteach.config.recipe import Recipe
from selfteach.errors import PartError
from selfteach.prompts.tool_calls import ToolFormat
from selfteach.protocols import Environment
from selfteach.rollout.episode_engine import EpisodeLimits
from selfteach.runtime.parts import construct_part, import_part, shown
from selfteach.tasks import chain_sums
from selfteach.tasks.environments import calculator, openenv_client, python_tool
from selfteach.tasks.environments.calculator_oracle import CalculatorOracle
from selfteach.tasks.environments.verifiers_environment import EpisodeSource
from selfteach.tasks.hub_environments.shared_loop import SharedLoop
from selfteach.tasks.task import Task

METHODS = ("reset", "step", "verdict")
"""Methods without which an object is no environment."""


@dataclass(frozen=True)
class Environments:
    """Makes the environment of each episode of a recipe."""

    make: Callable[[], Environment]
    limits: EpisodeLimits
    prepare: Callable[[], object] = lambda: None
    """Starts what the environments share. Raises `DataError` or `PartError` if it cannot be started."""

    @cached_property
    def tools(self) -> Sequence[Mapping[str, Any]]:
        """Return the tools that the prompts offer."""
        return tuple(self.make().tools)


def build_environments(recipe: Recipe, task: Task | None = None) -> Environments | None:
    """Return what makes a recipe's environments; None without ``[environment]``.

    ``task`` has the environment of `verifiers`; without it there is none of that kind. Starts nothing.
    Raises `PartError` for a class that is no environment.
    """
    config = recipe.environment
    if config is None:
        return None
    limits = _limits(config)
    match config:
        case CalculatorEnvironmentConfig():
            return Environments(calculator.CalculatorEnvironment, limits)
        case PythonEnvironmentConfig():
            names = set(CodeConfig.model_fields) & set(PythonEnvironmentConfig.model_fields)
            runner = python_tool.PythonRunner(CodeConfig(**config.model_dump(include=names)))
            return Environments(lambda: python_tool.PythonEnvironment(runner), limits, runner.start)
        case OpenEnvEnvironmentConfig():
            sessions = _most_episodes(recipe, task)
            return Environments(
                lambda: openenv_client.OpenEnvEnvironment(config),
                limits,
                lambda: openenv_client.require_server(config, sessions),
            )
        case VerifiersEnvironmentConfig():
            if task is None or task.environment is None:
                return None
            loop = SharedLoop(task.environment.label, config.deadline_s)
            source = EpisodeSource(task.environment, config.success, loop)
            return Environments(source.make, limits)
        case CustomEnvironmentConfig():
            return Environments(_custom(config), limits)


def environment_tools(recipe: Recipe, task: Task | None) -> Sequence[Mapping[str, Any]]:
    """Return the tools of a recipe's environment; none without one."""
    environments = build_environments(recipe, task)
    return () if environments is None else environments.tools


def for_episodes(recipe: Recipe, task: Task, tool_format: ToolFormat | None) -> Task:
    """Return a recipe's task with the oracle of its episodes, instead of one that reads answers.

    Unchanged without ``[environment]``.
    """
    if recipe.environment is None:
        return task
    is_calculator = isinstance(recipe.environment, CalculatorEnvironmentConfig)
    if is_calculator and task.oracle is chain_sums.critique_rollout and tool_format is not None:
        return replace(task, oracle=CalculatorOracle(tool_format))
    return replace(task, oracle=None)


def _most_episodes(recipe: Recipe, task: Task | None) -> int:
    """Return the most episodes of a batch, of a step or of an evaluation: they run side by side."""
    size, evaluation = recipe.sampling.batch_size, recipe.evaluation
    groups = [(recipe.train.problems_per_step, recipe.train.group_size)]
    if task is not None:
        groups.append((len(task.validation), evaluation.validation_k))
        groups.append((len(task.test), evaluation.test_k))
    return max(min(problems, max(1, size // k)) * k for problems, k in groups if k)


def _limits(config: EnvironmentConfig) -> EpisodeLimits:
    return EpisodeLimits(
        config.max_turns,
        config.deadline_s,
        config.concurrency,
        config.max_reply_chars,
        config.seed_by,
    )


def _custom(config: CustomEnvironmentConfig) -> Callable[[], Environment]:
    """Return what makes an environment of a user's own; an object is copied for each episode."""
    imported = import_part("environment", config.type)  # once: a name from Python is known only now
    part = config.model_copy()

    def make() -> Environment:
        built, _ = construct_part("environment", part, imported=imported)
        return copy.deepcopy(built) if built is imported.target else built

    label, first = f"environment {shown(config.type)}", make()
    missing = [name for name in METHODS if not callable(getattr(first, name, None))]
    if not hasattr(first, "tools"):
        missing.append("tools")
    if missing:
        raise PartError(
            f"{label}: has no {', '.join(missing)}: see selfteach.protocols.Environment"
        )
    _require_tools(label, first.tools)
    return make


def _require_tools(label: str, tools: object) -> None:
    """Raise `PartError` for tools that are no JSON schemas of functions."""
    for tool in tools if isinstance(tools, Sequence) else [None]:
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise PartError(
                f'{label}: its tools are no list of {{"type": "function", "function": {{"name": …, '
                '"parameters": …}}'
            )
