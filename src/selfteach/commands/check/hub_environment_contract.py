"""Tries the rewards of an environment of `verifiers` on made-up rollouts, for `selfteach check`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from selfteach.commands.check.part_contracts import made_up_rollouts
from selfteach.errors import PartError
from selfteach.feedback.rewards.combined_reward import CombinedReward
from selfteach.feedback.rewards.environment_reward import EnvironmentReward
from selfteach.trainer.build import Built
from selfteach.types import Verdict


def check_environment_rewards(built: Built) -> Iterator[str]:
    """Yield a line if there is an environment. Raises `PartError` for a reward that always raises."""
    reward, environment = built.components.reward, built.task.environment
    if environment is None or not isinstance(reward, CombinedReward):
        return
    sources = [source for source in reward.sources if isinstance(source, EnvironmentReward)]
    if not sources:
        return
    rollouts = list(made_up_rollouts(built))
    alone = replace(reward, sources=sources, success=None)
    verdicts = alone([(rollout, Verdict.of_final(False, None)) for rollout in rollouts])
    for source in sources:
        failures = [v.rewards.failures.get(source.name) for v in verdicts if v.rewards is not None]
        if failures and all(failures):
            raise PartError(
                f"{environment.label}: its reward {source.name} failed for each of {len(rollouts)} "
                f"made-up rollouts: {failures[0]}"
            )
    yield f"{environment.description}; tried on {len(rollouts)} made-up rollouts"
