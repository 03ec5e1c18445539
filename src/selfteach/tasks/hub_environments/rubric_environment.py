"""Wraps a classic environment of `verifiers`: a dataset and a rubric of reward functions.

The library makes a state of each rollout, which its functions read and write in order; so does this.
Functions that raise count as 0, as there.
"""

from __future__ import annotations

import asyncio
import inspect
import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from selfteach.errors import DataError
from selfteach.tasks.hub_environments.attempts import Attempt, Outcome, distinct, reason_of
from selfteach.tasks.hub_environments.library_state import (
    begun_state,
    messages_of,
    trajectory_step,
)
from selfteach.tasks.hub_environments.shared_loop import in_thread
from selfteach.tasks.sources.source_row import Row, shortest

COUNTS_TURNS = "MultiTurnMonitorRubric"
"""The library's rubric of one metric, the number of turns: here always 1."""


NOT_OVERRIDDEN = (
    "get_prompt_messages", "render_completion", "get_model_response", "add_model_response",
)  # fmt: skip
"""Methods of an environment of several turns that are not called here."""


@dataclass(frozen=True, slots=True)
class RubricFunction:
    """Names one reward function of a rubric; without a function the rubric scores as a whole."""

    rubric: Any
    function: Callable[..., Any] | None
    weight: float


class RubricEnvironment:
    """Scores attempts at the rows of an environment with its rubric. Raises `DataError`."""

    failed: float | None = 0.0

    def __init__(self, environment: Any, label: str, *, episodes: bool = False) -> None:
        """Read the rubric; with ``episodes`` of an environment of several turns."""
        from verifiers import MultiTurnEnv, Rubric, SingleTurnEnv  # pyright: ignore[reportMissingImports]

        self.label, self.environment, self._plain = label, environment, Rubric
        self._runs_episodes = episodes
        if episodes:
            _require_linear(environment, label, MultiTurnEnv)
            _call_tools_in_threads(environment)
        else:
            _require_single_turn(environment, label, SingleTurnEnv)
        self._functions: dict[str, RubricFunction] = {}
        for one in self._of(environment.rubric):
            name = type(one.rubric).__name__ if one.function is None else _name(one.function)
            self._functions[distinct(name, self._functions)] = one
        if not self._functions:
            raise DataError(f"{label}: its rubric has no reward function")
        if episodes:
            self._require_rewards_of_one()
        self.weights: Mapping[str, float] = {
            name: one.weight for name, one in self._functions.items()
        }
        self._rows: list[dict[str, Any]] = []

    def rows(self, limit: int | None) -> list[Row]:
        """Return the rows of its dataset, or of its evaluation set where it has no other."""
        dataset = self.environment.build_dataset()
        if dataset is None:
            dataset = self.environment.build_eval_dataset()
        return self._read(dataset, "train", limit)

    def held_out(self, limit: int | None) -> list[Row]:
        """Return the rows of its evaluation set, if it has a dataset beside it."""
        if self.environment.build_dataset() is None:
            return []
        return self._read(self.environment.build_eval_dataset(), "test", limit)

    async def score(self, attempts: Sequence[Attempt]) -> list[dict[str, Outcome]]:
        """Return the rewards of each attempt: functions in order, each for all attempts at once."""
        states = [await self._completed(attempt) for attempt in attempts]
        outcomes: list[dict[str, Outcome]] = [{} for _ in attempts]
        groups: defaultdict[int, list[int]] = defaultdict(list)
        for i, attempt in enumerate(attempts):
            groups[attempt.row].append(i)
        for name, one in self._functions.items():
            if one.function is not None and not one.rubric._is_group_func(one.function):
                values = await asyncio.gather(*(_called(one, state) for state in states))
                for outcome, value in zip(outcomes, values, strict=True):
                    outcome[name] = value
                continue
            for members in groups.values():
                values = await _called_with_group(one, [states[i] for i in members])
                for i, value in zip(members, values, strict=True):
                    outcomes[i][name] = value
        for state in states:
            await self.environment.rubric.cleanup(state)
        return outcomes

    def row(self, index: int) -> Mapping[str, Any]:
        """Return a row as the environment has it."""
        return self._rows[index]

    async def outcomes(self, state: Any) -> dict[str, Outcome]:
        """Return the rewards of one episode, which is over: functions in order."""
        return {
            name: await _called(one, state)
            if one.function is not None
            else (await _called_with_group(one, [state]))[0]
            for name, one in self._functions.items()
        }

    def _of(self, rubric: Any) -> Iterator[RubricFunction]:
        """Yield the functions of a rubric and of those in it, a rubric of another kind as a whole."""
        if type(rubric).__name__ == COUNTS_TURNS:
            return
        if inner := getattr(rubric, "rubrics", None):
            for one in inner:
                yield from self._of(one)
            return
        scores_otherwise = any(
            getattr(type(rubric), name) is not getattr(self._plain, name)
            for name in ("score_rollout", "score_group")
        )
        if scores_otherwise:
            yield RubricFunction(rubric, None, 1.0)
            return
        for function, weight in zip(rubric.funcs, rubric.weights, strict=True):
            yield RubricFunction(rubric, function, float(weight))

    def _read(self, dataset: Any, split: str, limit: int | None) -> list[Row]:
        if dataset is None:
            return []
        kinds = {field.name: field.type for field in dataset.features.arrow_schema}
        read = []
        for number, values in enumerate(dataset if limit is None else dataset.take(limit), start=1):
            row = {name: shortest(value, kinds.get(name)) for name, value in values.items()}
            if self._runs_episodes and "tool_defs" in (_plain_row(row).get("info") or {}):
                raise DataError(
                    f"{self.label} ({split}): row {number}: it has tools of its own (info.tool_defs), "
                    "and all episodes are offered the same"
                )
            self._rows.append(row)
            read.append(
                Row(_plain_row(row), f"{self.label} ({split}): row {number}", f"{split}-{number}")
            )
        return read

    def _require_rewards_of_one(self) -> None:
        """Raise `DataError` for a function that rewards a group at once: episodes end one by one."""
        for name, one in self._functions.items():
            if one.function is not None and one.rubric._is_group_func(one.function):
                raise DataError(
                    f"{self.label}: its reward {name} compares the rollouts of a group, and episodes "
                    "are rewarded one by one"
                )

    async def _completed(self, attempt: Attempt) -> Any:
        """Return the state that the library would have after this completion of a row."""
        state = await begun_state(self.environment, self._rows[attempt.row])
        messages = [{"role": "assistant", "content": attempt.text}]
        completion = messages_of(messages, "completion")
        cut = not attempt.finished
        step = trajectory_step(state, state["prompt"], completion, is_truncated=cut)
        state["trajectory"].append(step)
        state["completion"], state["is_completed"] = completion, True
        state["is_truncated"], state["stop_condition"] = cut, "max_turns_reached"
        return state


def _call_tools_in_threads(environment: Any) -> None:
    tools = getattr(environment, "tool_map", None)
    if isinstance(tools, dict):
        tools |= {name: in_thread(tool) for name, tool in tools.items()}


def _require_linear(environment: Any, label: str, several: type) -> None:
    """Raise `DataError` for an environment whose rollouts are no sequence of turns and replies."""
    kind = type(environment)
    if not isinstance(environment, several):
        raise DataError(f"{label}: a {kind.__name__} is no MultiTurnEnv, so it has no episodes")
    for method in NOT_OVERRIDDEN:
        if getattr(kind, method, None) is not getattr(several, method, None):
            raise DataError(
                f"{label}: {kind.__name__} has a {method} of its own: only environments whose messages "
                "follow one another can be run here"
            )


def _require_single_turn(environment: Any, label: str, single: type) -> None:
    kind = type(environment)
    if not isinstance(environment, single):
        raise DataError(
            f"{label}: a {kind.__name__} has several turns, tools or environments: for several turns "
            'or tools set [environment] type = "verifiers"; groups of environments cannot be trained on'
        )
    for method in ("env_response", "get_prompt_messages", "render_completion"):
        if getattr(kind, method) is not getattr(single, method):
            raise DataError(
                f"{label}: {kind.__name__} answers or edits messages ({method}), so it is none of a "
                'single turn: set [environment] type = "verifiers"'
            )
    if environment.tool_defs:
        raise DataError(f'{label}: it offers tools: set [environment] type = "verifiers"')


def _plain_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row as a source of problems has it: messages without empty fields, info as a table."""
    values = dict(row)
    if isinstance(values.get("prompt"), list):
        values["prompt"] = [
            {key: value for key, value in message.items() if value is not None}
            for message in values["prompt"]
        ]
    if isinstance(values.get("info"), str):
        with suppress(ValueError):
            values["info"] = json.loads(values["info"])
    return values


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", None) or type(function).__name__


async def _called(one: RubricFunction, state: Any) -> Outcome:
    """Return a function's reward of one rollout, or what it raised."""
    assert one.function is not None
    try:
        return float(await _awaited(one.function, one.rubric.score_objects(state)))
    except Exception as error:
        return reason_of(error)


async def _called_with_group(one: RubricFunction, states: Sequence[Any]) -> list[Outcome]:
    """Return the rewards of a group's rollouts, or for each what the function or the rubric raised."""
    try:
        if one.function is None:
            await one.rubric.score_group(list(states))
            return [float(state["reward"]) for state in states]
        values = await _awaited(one.function, one.rubric.group_score_objects(list(states)))
        rewards = [float(value) for value in values]
        if len(rewards) != len(states):
            raise ValueError(f"returned {len(rewards)} rewards for {len(states)} rollouts")
        return list(rewards)
    except Exception as error:
        return [reason_of(error)] * len(states)


async def _awaited(function: Callable[..., Any], objects: Mapping[str, Any]) -> Any:
    """Call a function with the objects that it names, or with all if it takes any."""
    parameters = inspect.signature(function).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    result = function(**{n: v for n, v in objects.items() if takes_all or n in parameters})
    return await result if inspect.isawaitable(result) else result
