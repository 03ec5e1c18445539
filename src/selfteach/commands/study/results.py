"""results.json: what a study's runs come to, read from their folders."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from selfteach.commands.study.jobs import Job
from selfteach.config.recipe_file import BASE, Study, pairs
from selfteach.evaluation.evaluation_record import evaluation_of
from selfteach.evaluation.statistics import Interval, bootstrap_difference, bootstrap_mean
from selfteach.runtime.run_folder import result_of

MEASURES = ("avg", "pass", "maj", "length", "truncated", "format")
COMPARED = ("avg", "pass", "maj", "length")
COLLAPSED_BELOW = 0.5
"""A run is marked as collapsed when it ends below this share of the base's Avg@k."""


def gather(study: Study, jobs: Sequence[Job], made: Mapping[str, Any]) -> dict[str, Any]:
    """results.json: estimates per arm, paired differences, variants, and how it was made."""
    seeds = [str(seed) for seed in study.study.seeds]
    variants = {
        name: {
            "title": variant.title,
            "seeds": list(variant.seeds),
            **_compare([job for job in jobs if job.variant == name], study.study.bootstrap),
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
        **_compare([job for job in jobs if job.variant is None], study.study.bootstrap),
        "variants": variants,
        "made": {"date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"), **made},
    }


def _compare(jobs: Sequence[Job], resamples: int) -> dict[str, Any]:
    """Arms and paired differences of one setting, the untrained model first."""
    by_arm: dict[str, list[Job]] = {}
    for job in sorted(jobs, key=lambda job: job.arm != BASE):
        by_arm.setdefault(job.arm, []).append(job)
    tables = {arm: _values(own) for arm, own in by_arm.items()}
    base_avg = tables[BASE]["avg"].mean()
    arms = {
        arm: _arm(own, tables[arm], resamples, base_avg if arm != BASE else None)
        for arm, own in by_arm.items()
    }
    paired = {}
    for pair in pairs([arm for arm in by_arm if arm != BASE]):
        a, b = pair.split("-")
        paired[pair] = {
            name: _plain(
                bootstrap_difference(tables[a][name], tables[b][name], resamples=resamples, seed=0)
            )
            for name in COMPARED
        }
    return {"arms": arms, "paired": paired}


def _values(jobs: Sequence[Job]) -> dict[str, np.ndarray]:
    """Each measure as [seeds, problems], from the saved test evaluations."""
    tables = [
        evaluation_of(job.folder, "test", job.recipe.train.steps).per_problem() for job in jobs
    ]
    return {name: np.stack([table[name] for table in tables]) for name in MEASURES}


def _arm(
    jobs: Sequence[Job], values: Mapping[str, np.ndarray], resamples: int, base_avg: float | None
) -> dict[str, Any]:
    results = [result_of(job.folder) for job in jobs]
    seeds = [str(job.seed) for job in jobs]
    arm: dict[str, Any] = {}
    for name in MEASURES:
        estimate = bootstrap_mean(values[name], resamples=resamples, seed=0)
        per_seed = dict(zip(seeds, values[name].mean(1).tolist(), strict=True))
        arm[name] = {**_plain(estimate), "per_seed": per_seed}
    arm["budget"] = {
        key: float(np.mean([result["budget"][key] for result in results]))
        for key in results[0]["budget"]
    }
    if base_avg is not None:
        curves = {s: r["curve"]["avg"] for s, r in zip(seeds, results, strict=True)}
        arm["curve"] = {"steps": results[0]["curve"]["steps"], "avg": curves}
        recipe = jobs[0].recipe
        arm["settings"] = {"optimizer.lr": recipe.optimizer.lr, "context": recipe.context.label}
        finals = values["avg"].mean(1)
        arm["collapsed"] = [
            job.seed
            for job, final in zip(jobs, finals, strict=True)
            if final < COLLAPSED_BELOW * base_avg
        ]
    return arm


def _plain(interval: Interval) -> dict[str, Any]:
    return {"mean": interval.mean, "ci95": [interval.low, interval.high]}
