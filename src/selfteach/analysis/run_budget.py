"""Sum up what runs spent: rollouts, tokens, requests, and seconds by phase."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from selfteach.analysis.results_table import mean_budget
from selfteach.analysis.results_text import BUDGET_TITLES
from selfteach.analysis.run_data import RunData

PHASES = ("rollout", "critique", "train")
"""Phases of a training step that can run at the same time."""


def run_budget(run: RunData) -> dict[str, float]:
    """Return what a run spent so far: sums over all rows of metrics.jsonl, seconds by phase."""
    timed = ("time/", "active_", "waiting")
    keys = {key for row in run.rows for key in row if key in BUDGET_TITLES or key.startswith(timed)}
    sums = {key: float(sum(row.get(key, 0) for row in run.rows)) for key in sorted(keys)}
    return {**sums, "seconds": sum(v for k, v in sums.items() if k.startswith("time/"))}


def arm_budget(runs: Sequence[RunData]) -> dict[str, float]:
    """Return `run_budget`, averaged over an arm's runs."""
    return mean_budget([run_budget(run) for run in runs])


def overlap(budget: Mapping[str, float]) -> float | None:
    """Return which share of the phases' possible overlap an arm reached, from its `arm_budget`.

    0: phases one after another; 1: together they took as long as the longest of them. None where
    nothing could overlap.
    """
    active = [budget.get(f"active_{phase}", 0.0) for phase in PHASES]
    elapsed = sum(budget.get(f"time/{phase}", 0.0) for phase in PHASES)
    possible = sum(active) - max(active)
    return min(1.0, max(0.0, (sum(active) - elapsed) / possible)) if possible > 0 else None
