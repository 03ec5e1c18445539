"""Wraps a taskset of `verifiers.v1`: tasks, each with methods that are its rewards.

A task of a single turn needs no tools, no container and no set-up, and its rewards read the trace of
the rollout alone. What raises is no reward, as in the library.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from pydantic import ValidationError

from selfteach.errors import DataError, RecipeError
from selfteach.tasks.hub_environments.attempts import Attempt, Outcome, reason_of
from selfteach.tasks.sources.source_row import Row

ONLY = "only tasks of a single turn can be trained on here"


class TasksetEnvironment:
    """Scores attempts at the tasks of a taskset with their rewards and judges. Raises `DataError`."""

    failed: float | None = None

    def __init__(self, taskset: Any, label: str) -> None:
        self.label, self._taskset = label, taskset
        self._tasks: list[Any] = []
        self._read: list[Row] | None = None
        self.weights: Mapping[str, float] = {}
        if taskset.toolsets(taskset.config):
            raise DataError(f"{label}: it offers tools: {ONLY}")

    @classmethod
    def build(cls, target: type, options: Mapping[str, Any], label: str) -> TasksetEnvironment:
        """Build a taskset of a class with the settings of its configuration. Raises `RecipeError`."""
        from verifiers.v1.configs.taskset import TasksetConfig  # pyright: ignore[reportMissingImports]
        from verifiers.v1.taskset import Taskset  # pyright: ignore[reportMissingImports]
        from verifiers.v1.utils.generic import concrete_type  # pyright: ignore[reportMissingImports]

        kind = concrete_type(target, TasksetConfig, origin=Taskset) or TasksetConfig
        try:
            config = kind.model_validate(dict(options))
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"]))
            raise RecipeError(f"{label}: option {key}: {first['msg']}") from None
        try:
            return cls(target(config), label)
        except DataError:
            raise
        except Exception as error:
            raise DataError(f"{label}: its construction {reason_of(error)}") from error

    def rows(self, limit: int | None) -> list[Row]:
        """Return a row for each task: its data, with the system prompt in the prompt."""
        if self._taskset.INFINITE and limit is None:
            raise DataError(f"{self.label}: it yields tasks for ever: set data.limit")
        try:
            self._tasks = list(islice(self._taskset, limit))
        except Exception as error:
            raise DataError(f"{self.label}: loading its tasks {reason_of(error)}") from error
        rows = []
        for number, task in enumerate(self._tasks, start=1):
            where = f"{self.label}: task {number}"
            self._require_single_turn(task, where)
            rows.append(Row(_row(task.data, where), where, f"task-{number}"))
        if self._tasks:
            self.weights = {
                name: weight for name, _, weight in _signals(self._tasks[0], self.label)
            }
            if not self.weights:
                raise DataError(f"{self.label}: its tasks have no reward")
        return rows

    def held_out(self, limit: int | None) -> list[Row]:
        """Return no rows: a taskset is one set of tasks."""
        return []

    async def score(self, attempts: Sequence[Attempt]) -> list[dict[str, Outcome]]:
        """Return the rewards of each attempt, all computed side by side."""
        return list(await asyncio.gather(*map(self._scored, attempts)))

    async def _scored(self, attempt: Attempt) -> dict[str, Outcome]:
        task = self._tasks[attempt.row]
        trace = _trace(task, attempt)
        available = {"task": task.data, "trace": trace}
        for function in task.hooks(
            "metric"
        ):  # rewards may read what a metric has left in the trace
            await _called(function, available)
        signals = list(_signals(task, self.label))
        values = await asyncio.gather(*(_called(function, available) for _, function, _ in signals))
        return {name: value for (name, _, _), value in zip(signals, values, strict=True)}

    def _require_single_turn(self, task: Any, where: str) -> None:
        from verifiers.v1.task import Task  # pyright: ignore[reportMissingImports]

        kind = type(task)
        for method in ("setup", "finalize"):
            if getattr(kind, method) is not getattr(Task, method):
                raise DataError(f"{where}: {kind.__name__}.{method} needs a runtime: {ONLY}")
        if kind.NEEDS_CONTAINER:
            raise DataError(f"{where}: {kind.__name__} needs a container: {ONLY}")
        if kind.toolsets(task.config):
            raise DataError(f"{where}: {kind.__name__} offers tools: {ONLY}")
        if task.data.prompt is None:
            raise DataError(f"{where}: it has no prompt, a user opens the conversation: {ONLY}")


def _row(data: Any, where: str) -> dict[str, Any]:
    """Return a task's data as a row whose prompt is a list of messages."""
    values = data.model_dump(mode="json", exclude_none=True)
    prompt = values["prompt"]
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if system := values.pop("system_prompt", None):
        messages = [{"role": "system", "content": system}, *messages]
    return {**values, "prompt": messages}


def _signals(task: Any, label: str) -> Iterator[tuple[str, Callable[..., Any], float]]:
    """Yield name, function and weight of each reward and judge. Raises `DataError` for a runtime."""
    rewards = [(f.__name__, f, getattr(f, "_vf_weight", 1.0)) for f in task.hooks("reward")]
    judges = [(j.reward_name, j.score, j.config.weight) for j in task.plugged_judges()]
    for name, function, weight in (*rewards, *judges):
        runtime = inspect.signature(function).parameters.get("runtime")
        if runtime is not None and runtime.default is runtime.empty:
            raise DataError(f"{label}: its reward {name} needs a runtime: {ONLY}")
        yield name, function, float(weight)


def _trace(task: Any, attempt: Attempt) -> Any:
    """Return the trace that the library would have after this completion of a task."""
    from verifiers.v1.configs.agent import AgentConfig  # pyright: ignore[reportMissingImports]
    from verifiers.v1.graph import MessageNode  # pyright: ignore[reportMissingImports]
    from verifiers.v1.state import state_cls  # pyright: ignore[reportMissingImports]
    from verifiers.v1.trace import AgentInfo, ModelCall, Trace, TraceTask  # pyright: ignore[reportMissingImports]
    from verifiers.v1.types import AssistantMessage, SystemMessage, UserMessage  # pyright: ignore[reportMissingImports]

    data = task.data
    prompt = (
        [UserMessage(content=data.prompt)] if isinstance(data.prompt, str) else list(data.prompt)
    )
    system = [SystemMessage(content=data.system_prompt)] if data.system_prompt else []
    nodes = [
        MessageNode(parent=i - 1 if i else None, message=message)
        for i, message in enumerate([*system, *prompt])
    ]
    reply = AssistantMessage(content=attempt.text)
    nodes.append(MessageNode(parent=len(nodes) - 1, message=reply, sampled=True))
    finish = "stop" if attempt.finished else "length"
    recorded = TraceTask(type=type(task).__name__, data=data, key=task.key, hash=task.hash)
    trace = Trace(
        task=recorded, agent=AgentInfo(config=AgentConfig()), state=state_cls(type(task))()
    )
    trace.nodes.extend(nodes)
    trace.calls.append(ModelCall(node=len(nodes) - 1, finish_reason=finish))
    trace.is_completed, trace.ok = True, True
    return trace


async def _called(function: Callable[..., Any], available: Mapping[str, Any]) -> Outcome:
    """Return a function's number, the sum of several by name, or what it raised."""
    from verifiers.v1.utils.decorators import invoke  # pyright: ignore[reportMissingImports]

    try:
        result = await invoke(function, dict(available))
        values = result.values() if isinstance(result, Mapping) else (result,)
        return float(sum(map(float, values)))
    except Exception as error:
        return reason_of(error)
