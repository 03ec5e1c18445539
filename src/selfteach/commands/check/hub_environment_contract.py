"""Tries the rewards of an environment of `verifiers`, or its episodes, for `selfteach check`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from selfteach.commands.check.part_contracts import made_up_rollouts
from selfteach.config.recipe import Recipe
from selfteach.episodes import Turn
from selfteach.errors import PartError
from selfteach.feedback.rewards.combined_reward import CombinedReward
from selfteach.feedback.rewards.environment_reward import EnvironmentReward
from selfteach.runtime.deadline_calls import CallFailure, call_all
from selfteach.tasks.hub_environments.environment_problems import HubEnvironment
from selfteach.trainer.build import Built
from selfteach.trainer.build_environment import Environments, build_environments
from selfteach.types import Rollout, Verdict

SEED = 1
"""Seed of the episodes that are tried."""


def check_environment_rewards(recipe: Recipe, built: Built) -> Iterator[str]:
    """Yield a line if there is an environment.

    Raises `PartError` for a reward that raises each time, and for an episode that cannot be run.
    """
    reward, environment = built.components.reward, built.task.environment
    environments = build_environments(recipe, built.task) if recipe.runs_hub_episodes else None
    if environment is not None and environments is not None:
        rollouts = list(made_up_rollouts(built))
        verdicts = [_episode(environments, environment, rollout) for rollout in rollouts]
        _require_rewards(environment, list(environment.weights), verdicts)
        yield f"{environment.description}; {len(rollouts)} episodes of one made-up turn were run"
    if environment is None or not isinstance(reward, CombinedReward):
        return
    sources = [source for source in reward.sources if isinstance(source, EnvironmentReward)]
    if not sources:
        return
    rollouts = list(made_up_rollouts(built))
    alone = replace(reward, sources=sources, success=None)
    verdicts = alone([(rollout, Verdict.of_final(False, None)) for rollout in rollouts])
    _require_rewards(environment, [source.name for source in sources], verdicts)
    yield f"{environment.description}; tried on {len(rollouts)} made-up rollouts"


def _require_rewards(
    environment: HubEnvironment, names: Sequence[str], verdicts: Sequence[Verdict]
) -> None:
    for name in names:
        failures = [v.rewards.failures.get(name) for v in verdicts if v.rewards is not None]
        if failures and all(failures):
            raise PartError(
                f"{environment.label}: its reward {name} failed for each of {len(verdicts)} "
                f"made-up rollouts: {failures[0]}"
            )


def _episode(environments: Environments, environment: HubEnvironment, rollout: Rollout) -> Verdict:
    """Run an episode of one turn. Raises `PartError` if it raises or outlasts its deadline."""
    one = environments.make()

    def run() -> Verdict:
        one.reset(rollout.problem, SEED)
        one.step(Turn(rollout.text))
        verdict = one.verdict()
        assert verdict is not None, "its rubric decides"
        return verdict

    (verdict,) = call_all([run], deadline_s=environments.limits.deadline_s, threads=1)
    if isinstance(verdict, CallFailure):
        raise PartError(
            f"{environment.label}: an episode of problem {rollout.problem.label!r} failed: "
            f"{verdict.detail}"
        )
    return verdict
