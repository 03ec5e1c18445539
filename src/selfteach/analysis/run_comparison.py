"""Compare run folders that no study has gathered, in the form of results.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from selfteach.analysis.results_table import (
    INTERVALS,
    MEASURES,
    ArmMeasurements,
    as_estimate,
    results_table,
)
from selfteach.analysis.run_budget import run_budget
from selfteach.analysis.run_data import Groups, RunData, evaluations, read_json
from selfteach.evaluation.evaluation_record import Evaluation
from selfteach.evaluation.intervals import PERCENT, difference_interval

BOOTSTRAP_NOTE = (
    "the intervals are those of an earlier version: a bootstrap over seeds and problems, which is too "
    "narrow with few seeds and near 100 %"
)


def compare_runs(groups: Groups, title: str) -> dict[str, Any]:
    """Compare arms, as `results_text.Results`.

    Test evaluations where every complete run has one, else validations. Runs in progress are left out
    where others are complete; where none is, all are compared at the last step that each has
    evaluated. Arms without any evaluation have no row. A pair is compared on the seeds that both have,
    with the same problems and k; ``notes`` says what is left out, and why.
    """
    split, last, notes = _evaluated(groups)
    pairs = []
    for a, b in combinations(last, 2):
        common = last[a].keys() & last[b].keys()
        if reason := _incomparable(*({s: last[arm][s] for s in common} for arm in (a, b))):
            notes.append(f"{b} and {a} are not compared: {reason}")
            continue
        pairs.append(f"{b}-{a}")
        if last[a].keys() != last[b].keys():
            seeds = ", ".join(map(str, sorted(common)))
            notes.append(f"{b} and {a} are compared on the seeds that both have: {seeds}")
    arms = {
        name: _measurements([run for run in groups[name] if run.seed in saved], saved)
        for name, saved in last.items()
    }
    runs = [run for runs in groups.values() for run in runs]
    ks = [evaluation.k for saved in last.values() for evaluation in saved.values()]
    return {
        **empty_results(title, _made(runs)),
        "split": split,
        "k": min(ks, default=0),
        "seeds": sorted({run.seed for run in runs}),
        **results_table(arms, pairs),
        "notes": notes,
    }


def with_current_intervals(results: Mapping[str, Any], runs: Sequence[RunData]) -> dict[str, Any]:
    """Return a study's results with the intervals of this version, from its runs' test evaluations.

    Results whose intervals an earlier version has made by a bootstrap are computed again; where an
    evaluation is missing they are returned as they are, with a note.
    """
    new = dict(results)
    if results["intervals"] == INTERVALS:
        return new
    settings = {None: results, **results.get("variants", {})}
    tables = {name: _table(setting, name, runs) for name, setting in settings.items()}
    if not all(tables.values()):
        return {**new, "notes": [*results.get("notes", ()), BOOTSTRAP_NOTE]}
    new |= tables.pop(None) or {}
    new["variants"] = {name: {**settings[name], **(table or {})} for name, table in tables.items()}
    return new


def _table(
    setting: Mapping[str, Any], variant: str | None, runs: Sequence[RunData]
) -> dict[str, Any] | None:
    """Return a setting's arms and pairs with current intervals; None if an evaluation is missing."""
    measured = {}
    for arm, summary in setting["arms"].items():
        seeds = [int(seed) for seed in summary["avg"]["per_seed"]]
        same_arm = [run for run in runs if (run.variant, run.arm) == (variant, arm)]
        last = _last(same_arm, "test")
        if not set(seeds) <= last.keys():
            return None
        per_problem = {seed: last[seed].per_problem() for seed in seeds}
        measured[arm] = ArmMeasurements(per_problem, budgets=[])
    table = results_table(measured, setting["paired"])
    for arm, summary in setting["arms"].items():
        table["arms"][arm] = {**summary, **{m: table["arms"][arm][m] for m in MEASURES}}
    return table


def empty_results(title: str, made: Mapping[str, Any]) -> dict[str, Any]:
    """Return results without an arm: where there is only an inspection to show."""
    return {
        "format": 1, "title": title, "split": "test", "k": 0, "seeds": [], "headline": [],
        "intervals": INTERVALS,
        "arms": {}, "paired": {}, "variants": {}, "notes": [], "made": made,
    }  # fmt: skip


def training_gain(runs: Sequence[RunData]) -> dict[str, Any] | None:
    """Compare an arm's last validation with its first: the same problems, paired.

    Returns ``{"first", "last", "steps", "k", "difference": Estimate}`` in percent and points; None
    without two evaluations per run of one shape.
    """
    pairs, k, last_step = [], 0, 0
    for run in runs:
        saved = evaluations(run, "validation")
        if len(saved) < 2:
            return None
        first_step, last_step = min(saved), max(saved)
        k = saved[first_step].k
        pairs.append(tuple(saved[s].per_problem()["avg"] for s in (first_step, last_step)))
    if not pairs or len({values.shape for pair in pairs for values in pair}) > 1:
        return None
    first_SP, last_SP = (np.stack(values) for values in zip(*pairs, strict=True))
    change = difference_interval(last_SP, first_SP, bounds=PERCENT)
    return {
        "first": float(first_SP.mean()), "last": float(last_SP.mean()), "steps": last_step,
        "k": k, "difference": as_estimate(change, seeds=len(pairs)),
    }  # fmt: skip


def _evaluated(groups: Groups) -> tuple[str, dict[str, dict[int, Evaluation]], list[str]]:
    """Return the split that is compared, each arm's evaluations by seed, and what was left out."""
    runs = [(name, run) for name, of_arm in groups.items() for run in of_arm]
    tests = [evaluations(run, "test") for _, run in runs]
    ended = [run.is_complete or bool(saved) for (_, run), saved in zip(runs, tests, strict=True)]
    is_tested = any(ended) and all(saved for saved, end in zip(tests, ended, strict=True) if end)
    split, notes = "test" if is_tested else "validation", list[str]()
    compared, left = dict[str, dict[int, dict[int, Evaluation]]](), list[str]()
    for (name, run), saved, end in zip(runs, tests, ended, strict=True):
        steps = saved if is_tested else evaluations(run, split)
        if any(ended) and not end:
            left.append(f"{name} (seed {run.seed})")
        elif steps:
            compared.setdefault(name, {})[run.seed] = steps
    if left:
        notes.append(f"not complete, and left out: {', '.join(left)}")
    every = [set(steps) for by_seed in compared.values() for steps in by_seed.values()]
    common = set.intersection(*every) if every and not any(ended) else set[int]()
    if common and any(steps != common for steps in every):
        notes.append(f"no run is complete: all are compared at step {max(common)}")
    return split, {
        name: {seed: steps[max(common or steps)] for seed, steps in by_seed.items()}
        for name, by_seed in compared.items()
    }, notes  # fmt: skip


def _last(runs: Sequence[RunData], split: str) -> dict[int, Evaluation]:
    """Return each seed's last evaluation on a split."""
    by_seed = {run.seed: evaluations(run, split) for run in runs}
    return {seed: saved[max(saved)] for seed, saved in by_seed.items() if saved}


def _measurements(runs: Sequence[RunData], last: Mapping[int, Evaluation]) -> ArmMeasurements:
    return ArmMeasurements(
        per_problem={seed: last[seed].per_problem() for seed in sorted(last)},
        budgets=[run_budget(run) for run in runs],
        curve=_curve(runs),
        settings={"optimizer.lr": runs[0].config["optimizer"]["lr"]},
    )


def _curve(runs: Sequence[RunData]) -> dict[str, Any] | None:
    """Return validation Avg@k by step, at the steps that every seed has reached."""
    by_run = [{row["step"]: row["avg"] for row in run.of_kind("validation")} for run in runs]
    steps = sorted(set.intersection(*map(set, by_run))) if by_run else []
    seeds = [str(run.seed) for run in runs]
    avg = {seed: [values[s] for s in steps] for seed, values in zip(seeds, by_run, strict=True)}
    return {"steps": steps, "avg": avg} if len(steps) > 1 else None


def _incomparable(a: Mapping[int, Evaluation], b: Mapping[int, Evaluation]) -> str | None:
    """Return why two arms cannot be paired; None if they can."""
    if not a:
        return "they ran with other seeds"
    if any(a[seed].problem_ids != b[seed].problem_ids for seed in a):
        return "they answered other problems"
    if any(a[seed].k != b[seed].k for seed in a):
        return "their k differs"
    if len({tuple(evaluation.problem_ids) for evaluation in a.values()}) > 1:
        return "their seeds answered different problems"
    return None


def _made(runs: Sequence[RunData]) -> dict[str, Any]:
    """Return how the first run was made; a report over runs has no command of its own."""
    path = runs[0].folder / "environment.json"
    made = read_json(path) if path.exists() else {}
    seconds = sum(run_budget(run)["seconds"] for run in runs)
    return {"commit": None, "versions": {}, **made, "seconds": seconds}
