"""Compute the table of results of one setting: each arm's estimates and the paired differences.

`selfteach study` writes it to results.json, and a report over run folders computes it from their
saved evaluations. All rates are in percent, lengths in tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from selfteach.evaluation.statistics import Interval, bootstrap_difference, bootstrap_mean

MEASURES = ("avg", "pass", "maj", "length", "truncated", "format")
"""Measures of an arm, in the order of the table."""
COMPARED = ("avg", "pass", "maj", "length")
"""Measures in which two arms are compared."""
BOOTSTRAP_SEED = 0
"""One seed for every bootstrap: the same draws for all arms and pairs."""


@dataclass(frozen=True, slots=True)
class ArmMeasurements:
    """Holds what the runs of one arm measured, before it is summarized."""

    per_problem: Mapping[int, Mapping[str, np.ndarray]]
    """By seed, in the same order in every arm: each of `MEASURES` per problem, [P]."""
    budgets: Sequence[Mapping[str, float]]
    """What each run spent, one entry per seed."""
    curve: Mapping[str, Any] | None = None
    """``{"steps": [...], "avg": {seed: [...]}}``: validation Avg@k (percent) by training step."""
    settings: Mapping[str, Any] | None = None
    """Settings that tell the arm from others, to be printed."""

    def values(self, measure: str) -> np.ndarray:
        """Return one measure as [S, P]; seeds with other problems are pooled as [1, all problems]."""
        values = [measures[measure] for measures in self.per_problem.values()]
        same_shape = len({v.shape for v in values}) == 1
        return np.stack(values) if same_shape else np.concatenate(values)[None]


def results_table(
    arms: Mapping[str, ArmMeasurements], pairs: Iterable[str], *, resamples: int
) -> dict[str, Any]:
    """Summarize arms and compare pairs of them, as ``{"arms": …, "paired": …}``.

    A pair ``b-a`` is b minus a, problem by problem and seed by seed, and needs the same seeds and
    problems in both; names of arms hold no ``-``. Intervals are 95 % bootstrap intervals over seeds
    and problems. Raises ValueError for a pair of unequal shapes, as `bootstrap_difference` does.
    """
    return {
        "arms": {name: _arm(arm, resamples) for name, arm in arms.items()},
        "paired": {
            f"{b}-{a}": _differences(arms[b], arms[a], resamples)
            for b, a in (pair.split("-") for pair in pairs)
        },
    }


def mean_budget(budgets: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the mean of each entry over runs; a run without the entry counts 0."""
    keys = {key: None for budget in budgets for key in budget}
    return {key: float(np.mean([budget.get(key, 0.0) for budget in budgets])) for key in keys}


def as_estimate(interval: Interval) -> dict[str, Any]:
    """Return an interval in the form of results.json: ``{"mean": 35.8, "ci95": [31.2, 40.1]}``."""
    return {"mean": interval.mean, "ci95": [interval.low, interval.high]}


def _arm(arm: ArmMeasurements, resamples: int) -> dict[str, Any]:
    summary: dict[str, Any] = {}
    for name in MEASURES:
        interval = bootstrap_mean(arm.values(name), resamples=resamples, seed=BOOTSTRAP_SEED)
        per_seed = {str(seed): float(v[name].mean()) for seed, v in arm.per_problem.items()}
        summary[name] = {**as_estimate(interval), "per_seed": per_seed}
    summary["budget"] = mean_budget(arm.budgets)
    if arm.curve is not None:
        summary["curve"] = dict(arm.curve)
    if arm.settings is not None:
        summary["settings"] = dict(arm.settings)
    return summary


def _differences(b: ArmMeasurements, a: ArmMeasurements, resamples: int) -> dict[str, Any]:
    return {
        name: as_estimate(
            bootstrap_difference(
                b.values(name), a.values(name), resamples=resamples, seed=BOOTSTRAP_SEED
            )
        )
        for name in COMPARED
    }
