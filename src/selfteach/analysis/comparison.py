"""Results of runs that no study has gathered: in the shape of results.json, from saved evaluations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from selfteach.analysis.run_data import Groups, Row, Run, evaluations, per_problem, read_json
from selfteach.analysis.wording import BUDGET, MEASURES
from selfteach.evaluation.statistics import Interval, bootstrap_difference, bootstrap_mean

RESAMPLES = 10_000
COMPARED = ("avg", "pass", "maj", "length")


def results_of(groups: Groups, title: str) -> dict[str, Any]:
    """Arms side by side, as `wording.Results`.

    Test evaluations where every arm has one, else each run's last validation. Arms without any
    evaluation have no row. A pair is compared where both have the same seeds, problems and k;
    ``notes`` says which are not, and why.
    """
    split = "test" if all(_complete(runs, "test") for runs in groups.values()) else "validation"
    found = {name: scored for name, runs in groups.items() if (scored := _last(runs, split))}
    arms = {name: _arm(groups[name], scored) for name, scored in found.items()}
    paired, notes = {}, []
    for a, b in combinations(found, 2):
        if reason := _incomparable(found[a], found[b]):
            notes.append(f"{b} and {a} are not compared: {reason}")
        else:
            paired[f"{b}-{a}"] = _differences(found[b], found[a])
    seeds = sorted({run.seed for runs in groups.values() for run in runs})
    ks = [evaluation["k"] for scored in found.values() for evaluation in scored.values()]
    return {
        "format": 1, "title": title, "split": split, "k": min(ks, default=0), "seeds": seeds,
        "headline": [], "arms": arms, "paired": paired, "variants": {}, "notes": notes,
        "made": _made([run for runs in groups.values() for run in runs]),
    }  # fmt: skip


def nothing(title: str, made: Mapping[str, Any]) -> dict[str, Any]:
    """Results without an arm: where there is only an inspection to show."""
    return {
        "format": 1, "title": title, "split": "test", "k": 0, "seeds": [], "headline": [],
        "arms": {}, "paired": {}, "variants": {}, "notes": [], "made": made,
    }  # fmt: skip


def gain(runs: Sequence[Run]) -> dict[str, Any] | None:
    """What training changed: last against first validation, the same problems, paired.

    ``{"first", "last", "steps", "k", "difference": Estimate}`` in percent and points; None without
    two evaluations per run of one shape.
    """
    pairs, k, last_step = [], 0, 0
    for run in runs:
        saved = evaluations(run, "validation")
        if len(saved) < 2:
            return None
        first, last_step = min(saved), max(saved)
        k = saved[first]["k"]
        pairs.append((per_problem(saved[first])["avg"], per_problem(saved[last_step])["avg"]))
    if not pairs or len({values.shape for pair in pairs for values in pair}) > 1:
        return None
    first_SP, last_SP = (np.stack(side) for side in zip(*pairs, strict=True))
    change = bootstrap_difference(last_SP, first_SP, resamples=RESAMPLES, seed=0)
    return {
        "first": float(first_SP.mean()), "last": float(last_SP.mean()), "steps": last_step,
        "k": k, "difference": _plain(change),
    }  # fmt: skip


def spent(run: Run) -> dict[str, float]:
    """What a run has cost so far: sums over all rows of metrics.jsonl, seconds by phase."""
    timed = ("time/", "active_", "waiting")
    keys = {key for row in run.rows for key in row if key in BUDGET or key.startswith(timed)}
    sums = {key: float(sum(row.get(key, 0) for row in run.rows)) for key in sorted(keys)}
    return {**sums, "seconds": sum(v for k, v in sums.items() if k.startswith("time/"))}


def mean_spent(runs: Sequence[Run]) -> dict[str, float]:
    """`spent`, averaged over an arm's runs."""
    every = [spent(run) for run in runs]
    keys = {key: None for one in every for key in one}
    return {key: float(np.mean([one.get(key, 0.0) for one in every])) for key in keys}


def overlap(own: Mapping[str, float]) -> float | None:
    """How much of what could run side by side did, from an arm's `spent`; None where nothing could.

    0: phases one after another; 1: all took as long as the longest of them.
    """
    phases = ("rollout", "critique", "train")
    busy = [own.get(f"active_{phase}", 0.0) for phase in phases]
    took = sum(own.get(f"time/{phase}", 0.0) for phase in phases)
    could = sum(busy) - max(busy)
    return min(1.0, max(0.0, (sum(busy) - took) / could)) if could > 0 else None


def _complete(runs: Sequence[Run], split: str) -> bool:
    return all(evaluations(run, split) for run in runs)


def _last(runs: Sequence[Run], split: str) -> dict[int, Row]:
    """Each seed's last evaluation on a split."""
    saved = {run.seed: evaluations(run, split) for run in runs}
    return {seed: own[max(own)] for seed, own in saved.items() if own}


def _arm(runs: Sequence[Run], scored: Mapping[int, Row]) -> dict[str, Any]:
    tables = {seed: per_problem(evaluation) for seed, evaluation in scored.items()}
    arm: dict[str, Any] = {}
    for name in MEASURES:
        values = [table[name] for table in tables.values()]
        arm[name] = {
            **_plain(_mean(values)),
            "per_seed": {str(seed): float(table[name].mean()) for seed, table in tables.items()},
        }
    arm["budget"] = mean_spent(runs)
    arm["settings"] = {"optimizer.lr": runs[0].config["optimizer"]["lr"]}
    if curve := _curve(runs):
        arm["curve"] = curve
    return arm


def _curve(runs: Sequence[Run]) -> dict[str, Any] | None:
    """Validation Avg@k by step, at the steps that every seed has reached."""
    points = [{row["step"]: row["avg"] for row in run.of_kind("validation")} for run in runs]
    steps = sorted(set.intersection(*map(set, points))) if points else []
    seeds = [str(run.seed) for run in runs]
    avg = {seed: [own[s] for s in steps] for seed, own in zip(seeds, points, strict=True)}
    return {"steps": steps, "avg": avg} if len(steps) > 1 else None


def _mean(values: Sequence[np.ndarray]) -> Interval:
    """Over seeds and problems; seeds that were given other problems are pooled as problems."""
    same = len({v.shape for v in values}) == 1
    table = np.stack(values) if same else np.concatenate(values)[None]
    return bootstrap_mean(table, resamples=RESAMPLES, seed=0)


def _incomparable(a: Mapping[int, Row], b: Mapping[int, Row]) -> str | None:
    if a.keys() != b.keys():
        return "they ran with other seeds"
    if any(a[seed]["problem_ids"] != b[seed]["problem_ids"] for seed in a):
        return "they answered other problems"
    if any(a[seed]["k"] != b[seed]["k"] for seed in a):
        return "their k differs"
    if len({tuple(evaluation["problem_ids"]) for evaluation in a.values()}) > 1:
        return "their seeds answered different problems"
    return None


def _differences(b: Mapping[int, Row], a: Mapping[int, Row]) -> dict[str, Any]:
    def table(scored: Mapping[int, Row], name: str) -> np.ndarray:
        return np.stack([per_problem(scored[seed])[name] for seed in sorted(scored)])

    return {
        name: _plain(
            bootstrap_difference(table(b, name), table(a, name), resamples=RESAMPLES, seed=0)
        )
        for name in COMPARED
    }


def _made(runs: Sequence[Run]) -> dict[str, Any]:
    """How the first run was made; a report over runs has no command of its own."""
    path = runs[0].folder / "environment.json"
    made = read_json(path) if path.exists() else {}
    seconds = sum(spent(run)["seconds"] for run in runs)
    return {"commit": None, "versions": {}, **made, "seconds": seconds}


def _plain(interval: Interval) -> dict[str, Any]:
    return {"mean": interval.mean, "ci95": [interval.low, interval.high]}
