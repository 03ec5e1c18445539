"""Run a study: arms × seeds of one recipe, each run in its folder, then one results.json.

This module must not import torch, which takes seconds: only the processes of the runs import it.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from selfteach.commands.study.jobs import Job, JobsProgress, one_thread, run_jobs
from selfteach.commands.study.results import gather
from selfteach.config.data_section import LabData
from selfteach.config.migrations import migrate_study
from selfteach.config.part_names import unanchored
from selfteach.config.recipe import CRITIC_CONTEXTS, Recipe
from selfteach.config.recipe_file import BASE, Study, complete_study
from selfteach.config.schema import merge, validate
from selfteach.errors import CheckpointError, RecipeError
from selfteach.runtime.atomic_files import write_json
from selfteach.runtime.folder_start import clear_start, holds_work, require_empty
from selfteach.runtime.provenance import collect_provenance
from selfteach.runtime.run_folder import RunFolder, load_result
from selfteach.runtime.stored_files import read_json, reading

if TYPE_CHECKING:
    from selfteach.commands.inspect.inspection import InspectionRequest

INSPECTED_ROLLOUTS = 512
"""Rollouts of the untrained model that a study inspects by default."""
CONTROLS = ("reference", "aligned_reference", "answer_only", "shuffled_lines", "other_answer")
"""Contexts under which the untrained model is inspected in addition to those of the arms."""
FolderKind = Literal["study", "sweep"]

Summarize = Callable[[Path], None]
"""Summarizes the folder of a complete inspection."""


def create_study(study: Study, folder: Path, command: str, kind: FolderKind) -> None:
    """Create the folder of a study or sweep. Raises `CheckpointError` if it holds another one."""
    path = folder / "study.json"
    plain = study.model_dump(mode="json")
    if path.exists():
        saved = read_json(path)
        with reading(path):
            existing = unanchored(complete_study(saved["study"]))
            same = (existing, saved.get("kind")) == (unanchored(plain), kind)
        if same:
            return
        if holds_work(folder):
            raise CheckpointError(
                f"{folder} holds another study; choose another --out, "
                f"or continue that one: selfteach resume {folder}"
            )
        clear_start(folder)  # the other one has spent nothing
    require_empty(folder)
    write_json(path, {"kind": kind, "study": plain, "command": command, **collect_provenance()})


def load_existing(folder: Path) -> tuple[Study, str, FolderKind]:
    """Return the study in a folder, the command that started it, and whether it is a study or sweep."""
    saved = read_json(folder / "study.json")
    path = folder / "study.json"
    with reading(path):
        study = migrate_study(saved["study"], str(path))
        command, kind = str(saved["command"]), saved["kind"]
        if kind not in ("study", "sweep"):
            raise ValueError(f"kind = {kind!r}")
    return validate(Study, study, where=str(folder)), command, kind


def jobs_of(study: Study, folder: Path) -> list[Job]:
    """List all runs of a study: the main setting first, seed by seed, then the variants.

    The untrained models of the variants come last: such short runs leave no core idle at the end.
    """
    jobs, last = [], []
    settings: list[tuple[str | None, Sequence[int], Sequence[str]]] = [
        (None, study.study.seeds, list(study.arms))
    ]
    for name, variant in study.variants.items():
        settings.append((name, variant.seeds, variant.arms or list(study.arms)))
    for variant_name, seeds, arms in settings:
        root = folder / ("runs" if variant_name is None else f"variants/{variant_name}")
        for seed in seeds:
            base = study.base_recipe(seed=seed, variant=variant_name)
            untrained = Job(variant_name, BASE, seed, base, root / BASE / f"seed_{seed}")
            (last if variant_name else jobs).append(untrained)
            for arm in arms:
                recipe = study.recipe(arm, seed=seed, variant=variant_name)
                jobs.append(Job(variant_name, arm, seed, recipe, root / arm / f"seed_{seed}"))
    return [*jobs, *last]


def run_study(
    study: Study, folder: str | Path, *, command: str, progress: JobsProgress, summarize: Summarize
) -> dict[str, Any]:
    """Run every run that is not complete, then write and return results.json."""
    folder = Path(folder)
    with RunFolder(folder).lock():
        create_study(study, folder, command, "study")
        started = time.monotonic()
        jobs = jobs_of(study, folder)
        # The recorded environment is that of the start of the study, not that of this resume.
        start = read_json(folder / "study.json")
        inspection = partial(inspect_base, study, folder, start["commit"], summarize)
        run_jobs(jobs, study.study.workers, progress, also=inspection, folder=folder)
        made = {name: value for name, value in start.items() if name not in ("study", "kind")}
        machine = read_json(jobs[0].folder / "environment.json")  # written by a process with torch
        made |= {name: machine[name] for name in ("processor", "weights_dtype") if name in machine}
        previous = folder / "results.json"
        spent = read_json(previous)["made"]["seconds"] if previous.exists() else 0.0
        results = gather(study, jobs, {**made, "seconds": spent + time.monotonic() - started})
        write_json(folder / "results.json", results)
    return results


def recipes_of(study: Study) -> Iterator[Recipe]:
    """Yield the recipe of every arm in the main setting and in every variant, without seeds."""
    settings = [(None, list(study.arms)), *((n, v.arms) for n, v in study.variants.items())]
    for name, arms in settings:
        for arm in arms or study.arms:
            yield study.recipe(arm, variant=name)


def inspection_of(study: Study) -> tuple[Recipe, InspectionRequest] | None:
    """Return the recipe and request of the inspection of the untrained model; None if there is none.

    Contexts are those of the main setting's arms, and those of `CONTROLS` that need nothing the arms
    lack. A program critiques the rollouts where the task has one (with the error rate of the first arm
    that has a critic); a critic that writes is used only if ``study.inspect_answers`` is set, and then
    for the arms' contexts alone: each context costs a pass over all rollouts.
    """
    from selfteach.commands.inspect.inspection import InspectionRequest

    arms = [study.recipe(arm, seed=study.study.seeds[0]) for arm in study.arms]
    arm_contexts = {recipe.context.label for recipe in arms} - {"none"}
    model = next((recipe for recipe in arms if recipe.critic is not None), arms[0])
    wanted, programs = study.study.inspect_answers, model.has_oracle
    if wanted is None:
        wanted = INSPECTED_ROLLOUTS if programs or model.critic is None else 0
    if not arm_contexts or wanted == 0:
        return None
    k = model.evaluation.validation_k
    problems = -(-wanted // k)
    changes: dict[str, Any] = {"train": {"steps": 0}, "teacher": {"type": "live"}}
    if programs:
        changes["critic"] = {"type": "oracle"}
    if isinstance(model.data, LabData):  # enough problems; the first are those of the arms
        changes["data"] = {"validation": max(model.data.validation, problems)}
    recipe = validate(Recipe, merge(model.model_dump(mode="json"), changes), where="inspection")
    writes = recipe.critic is not None and not programs
    possible = [
        name
        for name in (() if writes else CONTROLS)
        if recipe.critic is not None or name not in CRITIC_CONTEXTS
    ]
    contexts = tuple(sorted({*arm_contexts, *possible}))
    parts = {
        recipe.context.label: part
        for recipe in arms
        if (part := recipe.context.custom_part) is not None
    }
    return recipe, InspectionRequest(
        contexts, k=k, limit=problems, seed=study.study.seeds[0], parts=parts
    )


def inspect_base(study: Study, folder: Path, commit: str | None, summarize: Summarize) -> None:
    """Inspect the untrained model in folder/inspection, unless that is complete."""
    inspection, target = inspection_of(study), folder / "inspection"
    if inspection is None:
        return
    if not (target / "inspection.json").exists():
        shutil.rmtree(target, ignore_errors=True)  # left by a killed process
        _inspect(*inspection, target, commit)
    if not (target / "localisation.json").exists():
        summarize(target)


def _inspect(recipe: Recipe, request: InspectionRequest, target: Path, commit: str | None) -> None:
    from selfteach.commands.inspect.inspection import inspect, sample_rollouts
    from selfteach.trainer.build import build, set_threads

    set_threads(one_thread(recipe).train.threads)
    built = build(recipe).for_measuring()
    rollouts = sample_rollouts(built, recipe, request, built.task.problems("validation"))
    made = {**collect_provenance(), "model": recipe.model.path, "commit": commit}
    inspect(built, recipe, request, rollouts, target, made=made)


def sweep_jobs(study: Study, folder: Path) -> list[Job]:
    """List the runs of a sweep: arms × learning rates × seeds; test problems are never scored."""
    if study.sweep is None:
        raise RecipeError("the recipe has no [sweep]: add lr = [...] and seeds = [...]")
    jobs = []
    for variant in (None, *study.sweep.variants):
        arms = study.variants[variant].arms if variant else None
        # Rates outermost: the runs of an arm with a large critic are then not side by side.
        for lr, arm, seed in product(study.sweep.lr, arms or study.arms, study.sweep.seeds):
            overrides = {"optimizer": {"lr": lr}, "evaluation": {"test": False}}
            recipe = study.recipe(arm, seed=seed, variant=variant, overrides=overrides)
            name = f"{variant or 'runs'}/{arm}/lr_{lr:g}/seed_{seed}"
            jobs.append(Job(variant, arm, seed, recipe, folder / name))
    return jobs


def run_sweep(
    study: Study, folder: str | Path, *, command: str, progress: JobsProgress
) -> dict[str, Any]:
    """Run the sweep and choose each arm's lr by the mean validation Avg@k at the last step."""
    folder = Path(folder)
    jobs = sweep_jobs(study, folder)
    with RunFolder(folder).lock():
        create_study(study, folder, command, "sweep")
        run_jobs(jobs, study.study.workers, progress, folder=folder)
    chosen: dict[str, Any] = {}
    for job in jobs:
        table = chosen.setdefault(job.variant or "main", {}).setdefault(job.arm, {"avg": {}})
        final = load_result(job.folder)["curve"]["avg"][-1]
        table["avg"].setdefault(f"{job.recipe.optimizer.lr:g}", {})[str(job.seed)] = final
    for arms in chosen.values():
        for table in arms.values():
            means = {lr: float(np.mean(list(v.values()))) for lr, v in table["avg"].items()}
            table["mean"] = means
            table["chosen"] = float(max(means, key=lambda lr: means[lr]))
    start = read_json(folder / "study.json")
    result = {"settings": chosen, "command": command, "commit": start["commit"]}
    write_json(folder / "sweep.json", result)
    return result
