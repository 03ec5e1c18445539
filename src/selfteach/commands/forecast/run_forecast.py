"""Forecast what the arms of a recipe can teach: collect, measure and decide, arm by arm."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from selfteach.analysis.results_table import as_estimate
from selfteach.commands.forecast import measures
from selfteach.commands.forecast.collection import (
    ArmData,
    Collector,
    ForecastRequest,
    ModelData,
    Progress,
    critic_key,
    dropped,
    failures,
)
from selfteach.commands.forecast.step_cost import MeanLengths, RateFile, step_cost
from selfteach.commands.forecast.verdict import PREDICTIVE, decide
from selfteach.config.objective_section import terms
from selfteach.config.recipe import Recipe
from selfteach.errors import CheckpointError, RecipeError
from selfteach.evaluation.statistics import Interval
from selfteach.runtime.atomic_files import write_json
from selfteach.runtime.folder_start import require_empty
from selfteach.runtime.part_sources import require_same_sources_of_all
from selfteach.runtime.provenance import collect_provenance
from selfteach.runtime.run_folder import RunFolder
from selfteach.runtime.stored_files import read_json
from selfteach.trainer.build import set_threads
from selfteach.trainer.preflight import preflight
from selfteach.types import Critique

FORMAT = 1
MODEL_SECTIONS = {"model", "data", "sampling"}
"""Recipe sections on which the untrained model's rollouts depend."""


def forecast(
    recipes: Mapping[str, Recipe],
    request: ForecastRequest,
    folder: str | Path | None = None,
    progress: Progress = lambda what, done, total: None,
) -> dict[str, Any]:
    """Return the forecast of some arms as ``forecast.json`` holds it (`docs/forecast.md`).

    Rollouts, critiques and the teacher's answers are kept in ``folder``; a second call samples only
    what is missing there. Without a folder they are kept nowhere, except that a critic model's replies
    are in its reply cache. Raises one of `selfteach.errors`.
    """
    if request.k < 2:
        raise RecipeError(
            f"a forecast compares rollouts of a problem: -k {request.k} is too few, use 2 or more"
        )
    recipes = {
        arm: recipe.model_copy(update={"seed": request.seed}) for arm, recipe in recipes.items()
    }
    preflight(recipes.values(), critic_only=True)
    set_threads(next(iter(recipes.values())).train.threads)
    with _folder_of(folder, recipes, request) as run:
        require_same_sources_of_all(run.path, recipes.values())
        rates, forecasts = RateFile(run.path / "rates.json"), dict[str, Any]()
        for number, names in enumerate(_by_model(recipes)):
            arms = {name: recipes[name] for name in names}
            data = Collector(arms, request, run, rates, f"base_{number}", progress).collect()
            forecasts |= {name: forecast_arm(data, arm) for name, arm in data.arms.items()}
        result = {
            "format": FORMAT,
            **asdict(request),
            "units": measures.UNITS,
            "predictive": PREDICTIVE,
            "notes": list(notes(recipes)),
            "arms": {name: forecasts[name] for name in recipes},
            "made": collect_provenance(),
        }
        write_json(run.path / "forecast.json", result)
    return result


def forecast_arm(data: ModelData, arm: ArmData) -> dict[str, Any]:
    """Measure one arm, decide about it, and compute what its step costs."""
    _, grpo = terms(arm.recipe.objective)
    measured = measure_arm(data, arm)
    absent = dropped(data.prepared, arm.view) if arm.view else {}
    obstacle = next(iter(absent), "")
    if obstacle in failures(arm.critiqued):
        obstacle = f"the critic's reply is {obstacle}"
    outcome, reasons = decide(
        measured, distills=arm.recipe.shows_context, rewards=grpo is not None, obstacle=obstacle
    )
    is_unbiased = measures.is_unbiased(data.k, arm.recipe.train.group_size)
    return {
        "teacher_sees": arm.recipe.context.label if arm.view else None,
        "measures": {name: _estimate(value) for name, value in measured.items()},
        "problems": len(data.correct_PK),
        "mixed_groups_from": "subsets of the rollouts" if is_unbiased else "each problem's rate",
        "critic_failures": failures(arm.critiqued),
        "without_context": absent,
        "step": _cost(data, arm, measured.get("shown")),
        "verdict": outcome,
        "reasons": reasons,
    }


def measure_arm(data: ModelData, arm: ArmData) -> dict[str, Interval | None]:
    """Return all measures of an arm; None for one that does not apply to it."""
    correct_PK, k = data.correct_PK, data.k
    located_PK, sound_PK = (
        np.array(row).reshape(-1, k)
        for row in (
            [one.located for one in data.located],
            [one.critiqued.verdict.correct and one.first_error is None for one in data.located],
        )
    )
    measured: dict[str, Interval | None] = dict.fromkeys(measures.UNITS)
    measured["right"] = measures.share(correct_PK)
    measured["sound"] = measures.share(sound_PK, located_PK)
    group_size = arm.recipe.train.group_size
    measured["mixed_groups"] = measures.mixed_groups(correct_PK, group_size)
    if arm.recipe.critic is not None:
        usable = [isinstance(one.critique, Critique) for one in arm.critiqued]
        measured["usable_critiques"] = measures.share(np.array(usable).reshape(-1, k))
    if arm.view is None:
        return measured
    teacher_PK = data.teacher_PK[arm.view]
    measured["shown"] = measures.share(np.isfinite(teacher_PK))
    measured["edge"] = measures.edge(teacher_PK, correct_PK)
    measured["edge_on_wrong"] = measures.edge(teacher_PK, correct_PK, wrong_only=True)
    if data.inspection is not None and np.isfinite(teacher_PK).any():
        measured |= measures.token_measures(data.inspection, data.reverse_kl_N, arm.view)
    return measured


def notes(recipes: Mapping[str, Recipe]) -> Iterator[str]:
    """Yield what a reader must know about how the arms were measured."""
    served = [arm for arm, recipe in recipes.items() if recipe.engine.type != "transformers"]
    if served:
        yield (
            f"{', '.join(served)}: sampled with transformers in this process, not with vLLM; the "
            "seconds of sampling are not those of a run"
        )


def _cost(data: ModelData, arm: ArmData, shown: Interval | None) -> dict[str, float | None]:
    rollouts, name, view = data.rollouts, data.rates_name, arm.view
    by_view = [one.teacher_prompts for one in data.prepared] if view is not None else []
    prompts = [len(prompts[view or ""]) for prompts in by_view if view in prompts]
    lengths = MeanLengths(
        fmean(len(rollout.prompt_ids) for rollout in rollouts),
        fmean(len(rollout.token_ids) for rollout in rollouts),
        fmean(prompts) if prompts else None,
        fmean(rollout.length for rollout in rollouts),
    )
    rates = {kind: data.rates.get(f"{name}/{kind}") for kind in ("sampling", "training", "scoring")}
    rates["critique"] = data.rates.get(f"{name}/critique/{critic_key(arm.recipe)}")
    if arm.recipe.engine.type != "transformers":
        rates["sampling"] = None
    return step_cost(arm.recipe, lengths, rates, 0.0 if shown is None else shown.mean / 100)


def _by_model(recipes: Mapping[str, Recipe]) -> list[list[str]]:
    """Group the arms that share model, problems and sampling, so that each model is built once."""
    groups: dict[str, list[str]] = {}
    for arm, recipe in recipes.items():
        groups.setdefault(recipe.model_dump_json(include=MODEL_SECTIONS), []).append(arm)
    return list(groups.values())


@contextmanager
def _folder_of(
    folder: str | Path | None, recipes: Mapping[str, Recipe], request: ForecastRequest
) -> Iterator[RunFolder]:
    """Yield the folder, locked; a temporary one for None. Raises `CheckpointError` for another's."""
    with tempfile.TemporaryDirectory(prefix="selfteach-") as temporary:
        run = RunFolder(folder or Path(temporary))
        with run.lock():
            _claim(run.path, recipes, request)
            yield run


def _claim(path: Path, recipes: Mapping[str, Recipe], request: ForecastRequest) -> None:
    """Record what a folder's forecast is of. Raises `CheckpointError` if it is of something else."""
    arms = {arm: recipe.model_dump(mode="json") for arm, recipe in recipes.items()}
    config = json.loads(json.dumps({"forecast": asdict(request), "arms": arms}))
    saved = path / "config.json"
    if not saved.exists():
        require_empty(path)
        write_json(saved, config)
    elif (existing := read_json(saved)) != config:
        what = "forecast" if "forecast" in existing else "run"
        raise CheckpointError(
            f"{path} holds another {what} (other arms, settings or numbers); choose another --out"
        )


def _estimate(value: Interval | None) -> dict[str, Any] | None:
    return None if value is None else as_estimate(value)
