"""Combines the rewards of a recipe: computes each once, sums them by weight, and decides success."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from selfteach.errors import PartError
from selfteach.feedback.rewards.environment_reward import EnvironmentReward, environments
from selfteach.feedback.rewards.llm_judge import LlmJudge
from selfteach.feedback.rewards.reward_function import RewardFunction
from selfteach.feedback.rewards.reward_journal import RewardJournal
from selfteach.feedback.rewards.scored import BatchScores, Score
from selfteach.feedback.rewards.trl_arguments import reward_arguments
from selfteach.protocols import Reward
from selfteach.runtime.event_loop import EventLoop
from selfteach.types import Rewards, Rollout, Usage, Verdict

log = logging.getLogger(__name__)

Judged = Sequence[tuple[Rollout, Verdict]]


@dataclass(frozen=True, slots=True)
class VerdictReward:
    """Rewards a rollout with 1 if the verifier accepts it, else with 0."""

    name: str
    weight: float

    def scores(self, judged: Judged) -> BatchScores:
        """Return the verdicts as numbers."""
        return BatchScores([Score(float(verdict.correct)) for _, verdict in judged])


Source = VerdictReward | LlmJudge | RewardFunction | EnvironmentReward


@dataclass(frozen=True, slots=True)
class CombinedReward:
    """Computes the rewards of a recipe.

    As TRL does, functions are called one after another with all rollouts of a batch, and those that are
    async run together; judges are asked in the meantime. The total is the weighted sum of the rewards
    that apply (are not None); where none applies, the rollout has no reward, and no part in its group.
    """

    sources: Sequence[Source]
    success: float | None
    """Total from which on a rollout is a success; None leaves the verifier's verdict."""
    completion: Callable[[Sequence[int]], str]
    """Decodes a rollout with its thought."""
    state: Callable[[int], Any]
    """Returns ``trainer_state`` after so many updates of the policy."""
    loop: EventLoop = field(default_factory=EventLoop)

    @property
    def in_main_thread(self) -> bool:
        """Return True if a function must be called in the main thread, as TRL calls it."""
        return any(
            isinstance(s, EnvironmentReward) or (isinstance(s, RewardFunction) and not s.is_async)
            for s in self.sources
        )

    def at(self, update: int, journal: RewardJournal | None) -> Reward:
        """Return the reward of one batch: after so many updates, stored in a run folder."""
        return partial(self.__call__, update=update, journal=journal)

    def __call__(
        self, judged: Judged, *, update: int = 0, journal: RewardJournal | None = None
    ) -> list[Verdict]:
        """Return the verdicts with the rewards of each rollout. Raises `PartError` or `CriticError`."""
        if not judged:
            return []
        scores = self._scores(judged, update, journal)
        verdicts = [
            self._verdict(verdict, {name: batch.scores[i] for name, batch in scores.items()})
            for i, (_, verdict) in enumerate(judged)
        ]
        if unscored := [r for (r, _), v in zip(judged, verdicts, strict=True) if v.reward is None]:
            log.warning(
                "no reward applies to sample %d of problem %r, nor to %d more: they have no part in "
                "the loss of GRPO", unscored[0].sample, unscored[0].problem.label, len(unscored) - 1,
            )  # fmt: skip
        return _with_logged(verdicts, scores)

    def _scores(
        self, judged: Judged, update: int, journal: RewardJournal | None
    ) -> dict[str, BatchScores]:
        """Return the scores of each source, stored ones where there are any."""
        rollouts = [rollout for rollout, _ in judged]
        scores: dict[str, BatchScores] = {}
        for source in self.sources:
            stored = journal.load(source.name, rollouts) if journal is not None else None
            if stored is not None:
                scores[source.name] = stored
        missing = [source for source in self.sources if source.name not in scores]

        def keep(name: str, computed: BatchScores) -> None:
            if journal is not None:
                journal.save(name, rollouts, computed)
            scores[name] = computed

        functions = [source for source in missing if isinstance(source, RewardFunction)]
        arguments: Mapping[str, Any] = {}
        if functions:
            arguments = reward_arguments(rollouts, self.completion, self.state(update))
        for scorer, names in environments(missing).items():
            for name, computed in scorer.scores(rollouts, self.completion, self.loop).items():
                if name in names:
                    keep(name, computed)
        for function in functions:
            if not function.is_async:
                keep(function.name, function.scores(rollouts, arguments))
        awaited = {
            function.name: self.loop.start(function.scores_async(rollouts, arguments))
            for function in functions
            if function.is_async
        }
        self._meanwhile(missing, judged, journal, keep, awaited)
        return {source.name: scores[source.name] for source in self.sources}

    def _meanwhile(
        self,
        missing: Sequence[Source],
        judged: Judged,
        journal: RewardJournal | None,
        keep: Callable[[str, BatchScores], None],
        awaited: Mapping[str, Future[BatchScores]],
    ) -> None:
        """Verify and ask judges while functions are awaited; what returned is kept if one raises."""
        errors: list[Exception] = []
        try:
            for source in missing:
                if isinstance(source, VerdictReward):
                    keep(source.name, source.scores(judged))
                elif isinstance(source, LlmJudge):
                    try:
                        with journal.buying(source.name) if journal is not None else nullcontext():
                            keep(source.name, source.scores([rollout for rollout, _ in judged]))
                    except Exception as error:
                        errors.append(error)
            for name, future in awaited.items():
                try:
                    keep(name, future.result())
                except Exception as error:
                    errors.append(error)
        except BaseException:
            for future in awaited.values():
                future.cancel()
            raise
        if errors:
            raise errors[0]

    def _verdict(self, verdict: Verdict, scores: Mapping[str, Score]) -> Verdict:
        values = {name: score.value for name, score in scores.items()}
        weighted = [
            source.weight * value
            for source in self.sources
            if (value := values[source.name]) is not None
        ]
        total = math.fsum(weighted) if weighted else None
        if total is not None and not math.isfinite(total):
            raise PartError(f"reward: the sum of {weighted} is not finite: use smaller weights")
        failures = {name: score.failure for name, score in scores.items() if score.failure}
        usage = sum((score.usage for score in scores.values()), Usage())
        rewards = Rewards(total, values, failures, usage)
        if self.success is None:
            return replace(verdict, rewards=rewards)
        correct = total is not None and total >= self.success
        feedback = None if correct else verdict.feedback or _feedback(total, self.success)
        return replace(verdict, correct=correct, feedback=feedback, rewards=rewards)


def _feedback(total: float | None, success: float) -> str:
    if total is None:
        return "The answer has no reward."
    return f"The answer's reward is {total:g}; a good one has at least {success:g}."


def _with_logged(verdicts: Sequence[Verdict], scores: Mapping[str, BatchScores]) -> list[Verdict]:
    """Put what functions logged into the record of the first rollout."""
    logged: dict[str, tuple[float, ...]] = {}
    for batch in scores.values():
        for name, values in batch.logged.items():
            logged[name] = (*logged.get(name, ()), *values)
    first, *others = verdicts
    assert first.rewards is not None
    return [replace(first, rewards=replace(first.rewards, logged=logged)), *others]
