"""Compute the metrics of a step's rewards, with the names that TRL logs."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict

from selfteach.types import Rewards, TrainingSample, Usage

JUDGE_BUDGET = tuple(f"judge_{name}" for name in Usage.__slots__)
"""Metrics of what judges cost, summed over a run's steps as its budget."""


def summarize_rewards(samples: Sequence[TrainingSample]) -> dict[str, float]:
    """Return mean and standard deviation of the total and of each reward; empty without ``[reward]``.

    Means are over the rollouts to which a reward applies; deviations are unbiased, as in TRL. A metric
    without a value is left out.
    """
    verdicts = [(sample.rollout.problem.id, sample.critiqued.verdict) for sample in samples]
    rewards = [verdict.rewards for _, verdict in verdicts if verdict.rewards is not None]
    if not rewards:
        return {}
    groups: defaultdict[str, set[float]] = defaultdict(set)
    for id_, verdict in verdicts:
        groups[id_] |= set() if verdict.reward is None else {verdict.reward}
    metrics = _moments("reward", "reward_std", [one.total for one in rewards])
    metrics["frac_reward_zero_std"] = sum(len(g) <= 1 for g in groups.values()) / len(groups)
    metrics |= _each(rewards)
    unscored = sum(one.total is None for one in rewards)
    if unscored:
        metrics["unscored"] = unscored / len(verdicts)
    return {**metrics, **_logged(rewards), **_judged(rewards)}


def mean_rewards(rewards: Sequence[Rewards]) -> dict[str, float]:
    """Return the means of the total and of each reward, for the row of an evaluation."""
    metrics = _moments("reward", "reward_std", [one.total for one in rewards])
    return {**metrics, **_each(rewards), **_judged(rewards)}


def _each(rewards: Sequence[Rewards]) -> dict[str, float]:
    """Return the moments of each reward by its name; an episode may lack some."""
    metrics: dict[str, float] = {}
    for name in dict.fromkeys(name for one in rewards for name in one.values):
        values = [one.values.get(name) for one in rewards]
        metrics |= _moments(f"rewards/{name}/mean", f"rewards/{name}/std", values)
    return metrics


def _moments(mean: str, std: str, values: Sequence[float | None]) -> dict[str, float]:
    numbers = [value for value in values if value is not None]
    if not numbers:
        return {}
    centre = math.fsum(numbers) / len(numbers)
    if len(numbers) < 2:
        return {mean: centre}
    variance = math.fsum((x - centre) ** 2 for x in numbers) / (len(numbers) - 1)
    return {mean: centre, std: math.sqrt(variance)}


def _logged(rewards: Sequence[Rewards]) -> dict[str, float]:
    """Return the mean of what functions logged under each name."""
    values: defaultdict[str, list[float]] = defaultdict(list)
    for one in rewards:
        for name, logged in one.logged.items():
            values[name] += logged
    return {f"log_metric/{name}": math.fsum(x) / len(x) for name, x in sorted(values.items())}


def _judged(rewards: Sequence[Rewards]) -> Mapping[str, float]:
    """Return what judges cost, and the share of rollouts for which each reward has no number."""
    usage = sum((one.usage for one in rewards), Usage())
    failures = Counter(
        f"{_failure(reason)}/{name}/{reason.partition(':')[0]}"
        for one in rewards
        for name, reason in one.failures.items()
    )
    shares = {name: count / len(rewards) for name, count in sorted(failures.items())}
    if usage == Usage():
        return shares
    return {**{f"judge_{name}": value for name, value in asdict(usage).items()}, **shares}


def _failure(reason: str) -> str:
    """Return the family of metrics of a failure: a judge's, or of a function that raised."""
    return "reward_failure" if reason.startswith("raised:") else "judge_failure"
