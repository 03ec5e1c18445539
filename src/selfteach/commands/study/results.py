"""Gather a study's results from the folders of its runs: results.json."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from typing import Any

from selfteach.analysis.results_table import ArmMeasurements, results_table
from selfteach.commands.study.jobs import Job
from selfteach.config.recipe_file import BASE, Study, pairs
from selfteach.evaluation.evaluation_record import load_evaluation
from selfteach.runtime.run_folder import load_result

COLLAPSED_BELOW = 0.5
"""A run counts as collapsed when it ends below this share of the base's Avg@k."""


def gather(study: Study, jobs: Sequence[Job], made: Mapping[str, Any]) -> dict[str, Any]:
    """Return results.json: estimates per arm, paired differences, variants, and how it was made."""
    seeds = [str(seed) for seed in study.study.seeds]
    variants = {
        name: {
            "title": variant.title,
            "seeds": list(variant.seeds),
            **_setting([job for job in jobs if job.variant == name]),
        }
        for name, variant in study.variants.items()
    }
    return {
        "format": 1,
        "title": study.study.title,
        "k": study.base_recipe(seed=0).evaluation.test_k,
        "seeds": [int(seed) for seed in seeds],
        "headline": list(study.study.headline),
        "axis": {"label": study.study.axis, "at": study.study.at} if study.study.at else None,
        **_setting([job for job in jobs if job.variant is None]),
        "variants": variants,
        "made": {"date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"), **made},
    }


def _setting(jobs: Sequence[Job]) -> dict[str, Any]:
    """Return arms and paired differences of one setting, the untrained model first."""
    by_arm: dict[str, list[Job]] = {}
    for job in sorted(jobs, key=lambda job: job.arm != BASE):
        by_arm.setdefault(job.arm, []).append(job)
    measurements = {arm: _measurements(arm_jobs) for arm, arm_jobs in by_arm.items()}
    trained = [arm for arm in by_arm if arm != BASE]
    table = results_table(measurements, pairs(trained))
    base_avg = table["arms"][BASE]["avg"]["mean"]
    for arm in trained:
        table["arms"][arm]["collapsed"] = _collapsed(table["arms"][arm], base_avg)
    return table


def _measurements(jobs: Sequence[Job]) -> ArmMeasurements:
    """Read an arm's test evaluations, budgets and curves; the base has no curve and no settings."""
    results = {job.seed: load_result(job.folder) for job in jobs}
    first = jobs[0]
    is_trained = first.arm != BASE
    avg = {str(seed): result["curve"]["avg"] for seed, result in results.items() if is_trained}
    return ArmMeasurements(
        per_problem={
            job.seed: load_evaluation(job.folder, "test", job.recipe.train.steps).per_problem()
            for job in jobs
        },
        budgets=[result["budget"] for result in results.values()],
        curve={"steps": results[first.seed]["curve"]["steps"], "avg": avg} if is_trained else None,
        settings={
            "optimizer.lr": first.recipe.optimizer.lr,
            "context": first.recipe.context.label,
        }
        if is_trained
        else None,
    )


def _collapsed(arm: Mapping[str, Any], base_avg: float) -> list[int]:
    """Return the seeds that ended below `COLLAPSED_BELOW` of the base's Avg@k."""
    final = arm["avg"]["per_seed"]
    return [int(seed) for seed, avg in final.items() if avg < COLLAPSED_BELOW * base_avg]
