"""Calls a reward function of one's own as TRL does, and checks what it returns."""

from __future__ import annotations

import asyncio
import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

from selfteach.config.reward_section import CustomRewardConfig
from selfteach.errors import PartError, SelfteachError
from selfteach.feedback.rewards.scored import BatchScores, Score
from selfteach.feedback.rewards.trl_arguments import Log
from selfteach.runtime.part_calls import place_of
from selfteach.runtime.parts import construct_part
from selfteach.types import Rollout

GIVEN = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
"""Arguments besides the columns."""


class RewardFunction:
    """Rewards rollouts with a function ``f(prompts, completions, completion_ids, **columns)``.

    A function without ``**kwargs`` gets the arguments that it names. One that is defined with ``async``
    is awaited (`scores_async`), on one event loop with the others of the recipe.
    """

    def __init__(self, function: Callable[..., Any], label: str, name: str, weight: float) -> None:
        self.name, self.weight = name, weight
        self._function, self._label = function, label
        self.is_async = _is_async(function)

    @classmethod
    def build(cls, config: CustomRewardConfig) -> Self:
        """Import and build the function that a recipe names. Raises `PartError`."""
        built, label = construct_part("reward", config)
        return cls(built, label, config.name, config.weight)

    def scores(self, rollouts: Sequence[Rollout], arguments: Mapping[str, Any]) -> BatchScores:
        """Call the function. Raises `PartError` if it raises, or returns what is no reward."""
        log = Log(len(rollouts))
        with_log = {**arguments, "log_extra": log.log_extra, "log_metric": log.log_metric}
        try:
            result = self._function(**self._taken(with_log))
        except Exception as error:
            raise self._raised(error, len(rollouts)) from error
        return self._checked(result, rollouts, log)

    async def scores_async(
        self, rollouts: Sequence[Rollout], arguments: Mapping[str, Any]
    ) -> BatchScores:
        """Call and await the function. Raises `PartError` as `scores` does."""
        log = Log(len(rollouts))
        with_log = {**arguments, "log_extra": log.log_extra, "log_metric": log.log_metric}
        try:
            result = await self._function(**self._taken(with_log))
        except (Exception, asyncio.CancelledError) as error:
            raise self._raised(error, len(rollouts)) from error
        return self._checked(result, rollouts, log)

    def _taken(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments that the function takes. Raises `PartError` for a missing column."""
        bound = self._function.keywords if isinstance(self._function, functools.partial) else {}
        taken = {name: value for name, value in arguments.items() if name not in bound}
        try:
            parameters = inspect.signature(self._function).parameters.values()
        except (TypeError, ValueError):  # written in C
            return taken
        for p in parameters:
            needed = p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
            if needed and p.name not in taken:
                columns = ", ".join(name for name in taken if name not in GIVEN)
                raise PartError(
                    f"{self._label}: takes {p.name!r}, and the problems have no such column: they have "
                    f"{columns}"
                )
        if any(p.kind is p.VAR_KEYWORD for p in parameters):
            return taken
        names = {p.name for p in parameters}
        return {name: value for name, value in taken.items() if name in names}

    def _raised(self, error: BaseException, count: int) -> SelfteachError:
        if isinstance(error, SelfteachError):
            return error
        return PartError(
            f"{self._label}: its call with {count} completions raised {type(error).__name__}: "
            f"{' '.join(str(error).split())}{place_of(error)}"
        )

    def _checked(self, result: Any, rollouts: Sequence[Rollout], log: Log) -> BatchScores:
        if inspect.isawaitable(result):
            if inspect.iscoroutine(result):
                result.close()
            raise PartError(f"{self._label}: returned something to await: define it with async def")
        try:
            values = None if isinstance(result, str | Mapping) else list(result)
        except TypeError:
            values = None
        if values is None:
            what = "None" if result is None else f"a {type(result).__name__}"
            raise PartError(f"{self._label}: returned {what} and not a list of rewards")
        if len(values) != len(rollouts):
            raise PartError(
                f"{self._label}: returned {len(values)} rewards for {len(rollouts)} completions: "
                "return one for each"
            )
        numbers = [self._number(*pair) for pair in zip(values, rollouts, strict=True)]
        scores = [Score(number, extra=log.extra(i)) for i, number in enumerate(numbers)]
        return BatchScores(scores, log.metrics)

    def _number(self, value: Any, rollout: Rollout) -> float | None:
        if value is None:
            return None
        try:
            number = math.nan if isinstance(value, str | bytes) else float(value)
        except (TypeError, ValueError, OverflowError, RuntimeError):
            number = math.nan
        if not math.isfinite(number):
            raise PartError(
                f"{self._label}: returned {str(value)[:60]!r} for sample {rollout.sample} of problem "
                f"{rollout.problem.label!r}: a reward is a finite number, or None where it does not "
                "apply"
            )
        return number


def _is_async(function: Any) -> bool:
    """Return True if calling a function, a partial or an object returns a coroutine."""
    while isinstance(function, functools.partial):
        function = function.func
    call = getattr(function, "__call__", None)  # noqa: B004 - of an object
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(call)
