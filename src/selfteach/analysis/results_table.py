"""Compute the table of results of one setting: each arm's estimates and the paired differences.

`selfteach study` writes it to results.json, and a report over run folders computes it from their
saved evaluations. All rates are in percent, lengths in tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from selfteach.evaluation.evaluation_record import bounds_of
from selfteach.evaluation.intervals import difference_interval, mean_interval
from selfteach.evaluation.statistics import Interval

MEASURES = ("avg", "pass", "maj", "length", "truncated", "format")
"""Measures of an arm, in the order of the table."""
COMPARED = ("avg", "pass", "maj", "length")
"""Measures in which two arms are compared."""
INTERVALS = "student"
"""Name of the intervals of `selfteach.evaluation.intervals`, beside the numbers in results.json."""


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

    def values(self, measure: str) -> list[np.ndarray]:
        """Return one measure, an array [P] for each seed."""
        return [measures[measure] for measures in self.per_problem.values()]


def results_table(arms: Mapping[str, ArmMeasurements], pairs: Iterable[str]) -> dict[str, Any]:
    """Summarize arms and compare pairs of them, as ``{"intervals": …, "arms": …, "paired": …}``.

    A pair ``b-a`` is b minus a, problem by problem and seed by seed, of the seeds that both have, and
    needs the same problems in both; names of arms hold no ``-``. Intervals are 95 % ones over seeds and
    problems, with one seed over problems only. Raises ValueError for a pair of unequal shapes.
    """
    return {
        "intervals": INTERVALS,
        "arms": {name: _arm(arm) for name, arm in arms.items()},
        "paired": {
            f"{b}-{a}": _differences(arms[b], arms[a])
            for b, a in (pair.split("-") for pair in pairs)
        },
    }


def mean_budget(budgets: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the mean of each entry over runs; a run without the entry counts 0."""
    keys = {key: None for budget in budgets for key in budget}
    return {key: float(np.mean([budget.get(key, 0.0) for budget in budgets])) for key in keys}


def as_estimate(interval: Interval, *, seeds: int | None = None) -> dict[str, Any]:
    """Return an interval in the form of results.json: ``{"mean": 35.8, "ci95": [31.2, 40.1]}``.

    ``seeds`` is how many training runs it is over: with one it says nothing about another run.
    """
    estimate = {"mean": interval.mean, "ci95": [interval.low, interval.high]}
    return estimate if seeds is None else {**estimate, "seeds": seeds}


def _arm(arm: ArmMeasurements) -> dict[str, Any]:
    summary: dict[str, Any] = {}
    for name in MEASURES:
        interval = mean_interval(arm.values(name), bounds=bounds_of(name))
        per_seed = {str(seed): float(v[name].mean()) for seed, v in arm.per_problem.items()}
        summary[name] = {**as_estimate(interval, seeds=len(per_seed)), "per_seed": per_seed}
    summary["budget"] = mean_budget(arm.budgets)
    if arm.curve is not None:
        summary["curve"] = dict(arm.curve)
    if arm.settings is not None:
        summary["settings"] = dict(arm.settings)
    return summary


def _differences(b: ArmMeasurements, a: ArmMeasurements) -> dict[str, Any]:
    common = [seed for seed in b.per_problem if seed in a.per_problem]

    def values(arm: ArmMeasurements, measure: str) -> list[np.ndarray]:
        return [arm.per_problem[seed][measure] for seed in common]

    return {name: _difference(values(b, name), values(a, name), name) for name in COMPARED}


def _difference(b: Sequence[np.ndarray], a: Sequence[np.ndarray], measure: str) -> dict[str, Any]:
    if [v.shape for v in b] != [v.shape for v in a] or len({v.shape for v in a}) != 1:
        raise ValueError(
            f"a pair needs seeds and problems in common, got {measure} of other shapes"
        )
    interval = difference_interval(np.stack(b), np.stack(a), bounds=bounds_of(measure))
    return as_estimate(interval, seeds=len(b))
