"""Rewards rollouts with the functions of an environment of the library `verifiers`."""

from __future__ import annotations

import asyncio
import logging
import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from selfteach.feedback.rewards.scored import BatchScores, Score
from selfteach.runtime.event_loop import EventLoop
from selfteach.tasks.hub_environments.attempts import Attempt
from selfteach.tasks.hub_environments.environment_problems import HubEnvironment
from selfteach.types import Rollout

log = logging.getLogger(__name__)
T = TypeVar("T")


class EnvironmentScorer:
    """Computes all rewards of an environment at once: its functions may read what others have left.

    A function that raises for a rollout leaves the value that the library gives it, 0 or none, and the
    reason; the rollouts are counted, and a warning names the first.
    """

    def __init__(self, environment: HubEnvironment) -> None:
        self.environment = environment
        self._runner: asyncio.Runner | None = None

    def scores(
        self,
        rollouts: Sequence[Rollout],
        completion: Callable[[Sequence[int]], str],
        loop: EventLoop,
    ) -> dict[str, BatchScores]:
        """Return each reward of all rollouts. Raises `DataError` for a problem of another source."""
        places = [self.environment.place(rollout.problem) for rollout in rollouts]
        scores: list[dict[str, Score]] = [{} for _ in rollouts]
        for number, load in enumerate(self.environment.loads):
            members = [i for i, (of, _) in enumerate(places) if of == number]
            if not members:
                continue
            attempts = [
                Attempt(places[i][1], completion(rollouts[i].token_ids), rollouts[i].finished)
                for i in members
            ]
            for i, outcomes in zip(members, self._run(load.score(attempts), loop), strict=True):
                scores[i] = {
                    name: Score(load.failed, failure=value)
                    if isinstance(value, str)
                    else Score(value)
                    for name, value in outcomes.items()
                }
        self._warn(rollouts, scores)
        return {
            name: BatchScores([of_rollout.get(name, Score(None)) for of_rollout in scores])
            for name in self.environment.weights
        }

    def _run(self, work: Coroutine[Any, Any, T], loop: EventLoop) -> T:
        """Run a coroutine in the main thread, whose signals math-verify needs, where that is free."""
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            is_free = threading.current_thread() is threading.main_thread()
        else:
            is_free = False  # a notebook's
        if not is_free:
            return loop.start(work).result()
        if self._runner is None:
            self._runner = asyncio.Runner()
            weakref.finalize(self, self._runner.close)
        return self._runner.run(work)

    def _warn(self, rollouts: Sequence[Rollout], scores: Sequence[dict[str, Score]]) -> None:
        failed: defaultdict[str, list[int]] = defaultdict(list)
        for i, of_rollout in enumerate(scores):
            for name, score in of_rollout.items():
                if score.failure:
                    failed[name].append(i)
        for name, members in failed.items():
            first = rollouts[members[0]]
            log.warning(
                "%s: its reward %s failed for %d of %d rollouts; sample %d of problem %r: %s",
                self.environment.label, name, len(members), len(rollouts), first.sample,
                first.problem.label, scores[members[0]][name].failure,
            )  # fmt: skip


@dataclass(frozen=True, slots=True)
class EnvironmentReward:
    """Names one reward of an environment."""

    name: str
    weight: float
    scorer: EnvironmentScorer


def environments(sources: Sequence[object]) -> dict[EnvironmentScorer, set[str]]:
    """Return the environments of which a reward is among the sources, with the names of these."""
    named: defaultdict[EnvironmentScorer, set[str]] = defaultdict(set)
    for source in sources:
        if isinstance(source, EnvironmentReward):
            named[source.scorer].add(source.name)
    return dict(named)
