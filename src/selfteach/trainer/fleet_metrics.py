"""Counts what each server of a fleet did for a step."""

from __future__ import annotations

from collections.abc import Mapping

from selfteach.feedback.rewards.combined_reward import CombinedReward
from selfteach.feedback.rewards.llm_judge import LlmJudge
from selfteach.protocols import Critic, Engine, Reward
from selfteach.runtime.dispatcher import Dispatcher, member_metrics
from selfteach.runtime.distributed import Ranks


def fleets_of(
    engine: Engine, critic: Critic | None, reward: Reward | None
) -> dict[str, Dispatcher]:
    """Return the dispatchers of all components with several servers, by the prefix of their metrics."""
    judges = reward.sources if isinstance(reward, CombinedReward) else ()
    served = {
        "engine_member": engine,
        "critic_member": critic,
        **{f"judge_member/{one.name}": one for one in judges if isinstance(one, LlmJudge)},
    }
    fleets = {prefix: getattr(component, "fleet", None) for prefix, component in served.items()}
    return {
        prefix: fleet
        for prefix, fleet in fleets.items()
        if isinstance(fleet, Dispatcher) and len(fleet) > 1
    }


def fleet_metrics(fleets: Mapping[str, Dispatcher], ranks: Ranks) -> dict[str, float]:
    """Return requests, seconds and failures of each member since the last step, of all ranks."""
    metrics: dict[str, float] = {}
    for prefix, fleet in fleets.items():
        metrics |= member_metrics(prefix, fleet.read_counts())
    return {name: ranks.sum(value) for name, value in metrics.items()}
