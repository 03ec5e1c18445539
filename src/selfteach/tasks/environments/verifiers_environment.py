"""Runs episodes with the environment of `verifiers` that gives the problems."""

from __future__ import annotations

from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

from selfteach.episodes import EnvironmentReply, Turn
from selfteach.errors import DataError
from selfteach.tasks.hub_environments.environment_problems import HubEnvironment
from selfteach.tasks.hub_environments.rubric_environment import RubricEnvironment
from selfteach.tasks.hub_environments.rubric_episode import RubricEpisode
from selfteach.tasks.hub_environments.shared_loop import SharedLoop
from selfteach.types import Problem, Verdict

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class EpisodeSource:
    """Holds what the episodes of a run share: the environment and its event loop."""

    hub: HubEnvironment
    success: float
    """Least reward that counts as a success."""
    loop: SharedLoop
    tools: Sequence[Mapping[str, Any]] = field(init=False)

    def __post_init__(self) -> None:
        """Read the tools. Raises `DataError` if not all loads offer the same."""
        first, *others = [_offered(load) for load in self.hub.loads]
        if any(other != first for other in others):
            raise DataError(
                f"{self.hub.label}: with data.test_options it offers other tools than without"
            )
        object.__setattr__(self, "tools", first)

    def make(self) -> VerifiersEnvironment:
        """Return what runs one episode."""
        return VerifiersEnvironment(self)


class VerifiersEnvironment:
    """Implements `Environment` on an environment of `verifiers`: one rollout of it.

    The rubric's weighted sum is the episode's reward, and a success from ``success`` on.
    """

    def __init__(self, source: EpisodeSource) -> None:
        self._source = source
        self._episode: RubricEpisode | None = None
        self._waiting: Future[Any] | None = None

    @property
    def tools(self) -> Sequence[Mapping[str, Any]]:
        """Return the environment's tools."""
        return self._source.tools

    def reset(self, problem: Problem, seed: int) -> str:
        """Set up the state of the problem's row. Raises `DataError` for one of another source."""
        number, row = self._source.hub.place(problem)
        load = self._source.hub.loads[number]
        assert isinstance(load, RubricEnvironment), "episodes are of these alone"
        self._episode = RubricEpisode(load)
        return self._run(self._episode.begin(load.row(row), seed))

    def step(self, turn: Turn) -> EnvironmentReply:
        """Reply to a turn, or end the episode."""
        return self._run(self._begun.reply(turn))

    def verdict(self) -> Verdict | None:
        """Return the rubric's rewards; the environment's last message is the feedback on a failure."""
        rewards = self._run(self._begun.finish())
        right = rewards.total is not None and rewards.total >= self._source.success
        feedback = None if right else self._begun.last_message or None
        return Verdict(right, True, None, feedback, rewards=rewards)

    def close(self) -> None:
        """Cancel what is awaited, and clean up after an episode that was not finished."""
        if self._waiting is not None and not self._waiting.done():
            self._waiting.cancel()
        if self._episode is not None:
            self._run(self._episode.close())

    @property
    def _begun(self) -> RubricEpisode:
        assert self._episode is not None, "reset begins the episode"
        return self._episode

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        future = self._source.loop.start(work)
        self._waiting = future
        return future.result()


def _offered(load: object) -> list[Mapping[str, Any]]:
    """Return the tools of a load as JSON schemas of functions."""
    assert isinstance(load, RubricEnvironment), "episodes are of these alone"
    tools = []
    for tool in load.environment.tool_defs or ():
        named = {key: tool[key] for key in ("name", "description", "parameters")}
        tools.append({"type": "function", "function": named})
    return tools
