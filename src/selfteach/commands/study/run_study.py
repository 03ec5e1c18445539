"""Arms × seeds under one recipe: every run in a folder of its own, one results.json, one report.

What only runs need, torch for one, takes seconds to import, and is imported in their processes.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from selfteach.commands.study.jobs import Job, Progress, by_engine, distinct, one_thread, run_jobs
from selfteach.commands.study.results import gather
from selfteach.config.critic_section import CriticConfig
from selfteach.config.data_section import ORACLE_DATA
from selfteach.config.migrations import migrate_study
from selfteach.config.recipe import CRITIC_CONTEXTS, Recipe
from selfteach.config.recipe_file import BASE, Study
from selfteach.config.schema import merge, validate
from selfteach.errors import CheckpointError, RecipeError
from selfteach.runtime.provenance import collect_provenance
from selfteach.runtime.run_folder import RunFolder, read_json, require_empty, result_of, write_json

if TYPE_CHECKING:
    from selfteach.commands.inspect.inspection import Request

INSPECTED = 512
"""Answers that a study inspects by default."""
CONTROLS = ("reference", "aligned_reference", "answer_only", "shuffled_lines", "other_answer")
"""Contexts under which a study's untrained model is inspected beside those of the arms."""
Kind = Literal["study", "sweep"]

SumUp = Callable[[Path], None]
"""What is made of an inspection's folder when it is complete."""


def create_study(study: Study, folder: Path, command: str, kind: Kind) -> None:
    """Begin a study (or sweep) here. Raises `CheckpointError` if the folder holds something else."""
    marker = folder / "study.json"
    plain = study.model_dump(mode="json")
    if marker.exists():
        saved = read_json(marker)
        if (_migrated(saved["study"]), saved.get("kind")) != (plain, kind):
            raise CheckpointError(
                f"{folder} holds another study; choose another --out, "
                f"or go on with that one: selfteach resume {folder}"
            )
        return
    require_empty(folder)
    write_json(marker, {"kind": kind, "study": plain, "command": command, **collect_provenance()})


def _migrated(plain: dict[str, Any]) -> dict[str, Any] | None:
    """A study of an earlier version with what studies have had since; None for what is none."""
    try:
        return validate(Study, migrate_study(plain)).model_dump(mode="json")
    except RecipeError:
        return None


def load_existing(folder: Path) -> tuple[Study, str, Kind]:
    """The study that a folder holds, the command that began it, and whether it is a sweep."""
    saved = read_json(folder / "study.json")
    study = migrate_study(saved["study"], str(folder / "study.json"))
    return validate(Study, study, where=str(folder)), saved["command"], saved["kind"]


def jobs_of(study: Study, folder: Path) -> list[Job]:
    """All runs of a study: the main setting first, seed by seed, then the variants.

    Variants' untrained models come last: such short runs leave no core idle at the end.
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
    study: Study, folder: Path, *, command: str, progress: Progress, sum_up: SumUp
) -> dict[str, Any]:
    """Run whatever is not done yet, then write and return results.json."""
    with RunFolder(folder).lock():
        create_study(study, folder, command, "study")
        started = time.monotonic()
        jobs = jobs_of(study, folder)
        # What it was made with is what it was begun with, not what the tree holds by now.
        begun = read_json(folder / "study.json")
        inspecting = partial(inspect_base, study, folder, begun["commit"], sum_up)
        run_jobs(jobs, study.study.workers, progress, beside=inspecting)
        made = {name: value for name, value in begun.items() if name not in ("study", "kind")}
        on = read_json(jobs[0].folder / "environment.json")  # by a process that has torch
        made |= {"processor": on["processor"]} if "processor" in on else {}
        earlier = folder / "results.json"
        spent = read_json(earlier)["made"]["seconds"] if earlier.exists() else 0.0
        results = gather(study, jobs, {**made, "seconds": spent + time.monotonic() - started})
        write_json(folder / "results.json", results)
    return results


def critics_of(study: Study) -> list[CriticConfig]:
    """Every critic that a study asks, once."""
    return distinct(recipe.critic for recipe in _recipes(study))


def engines_of(study: Study) -> list[Recipe]:
    """One recipe for each engine that a study samples from and each model that it gives it."""
    return by_engine(_recipes(study))


def _recipes(study: Study) -> Iterator[Recipe]:
    settings = [(None, list(study.arms)), *((n, v.arms) for n, v in study.variants.items())]
    for name, arms in settings:
        for arm in arms or study.arms:
            yield study.recipe(arm, variant=name)


def inspection_of(study: Study) -> tuple[Recipe, Request] | None:
    """How a study's untrained model is inspected; None where it is not.

    Under the contexts of the main setting's arms and `CONTROLS`, in as far as they need nothing that
    the arms have not. The answers are marked by a program where there is one (erring as in the first
    arm that has it); a critic that writes is asked only if ``study.inspect_answers`` says how often.
    """
    from selfteach.commands.inspect.inspection import Request

    arms = [study.recipe(arm, seed=study.study.seeds[0]) for arm in study.arms]
    taught = {own.context.label for own in arms} - {"none"}
    model = next((own for own in arms if own.critic is not None), arms[0])
    wanted, programs = study.study.inspect_answers, model.data.type in ORACLE_DATA
    if wanted is None:
        wanted = INSPECTED if programs or model.critic is None else 0
    if not taught or wanted == 0:
        return None
    k = model.evaluation.validation_k
    problems = -(-wanted // k)
    changes: dict[str, Any] = {"train": {"steps": 0}, "teacher": {"type": "live"}}
    if programs:
        changes["critic"] = {"type": "oracle"}
    if model.data.type == "lab":  # as many as are asked for, the arms' own first
        changes["data"] = {"validation": max(model.data.validation, problems)}
    recipe = validate(Recipe, merge(model.model_dump(mode="json"), changes), where="inspection")
    possible = [
        name for name in CONTROLS if recipe.critic is not None or name not in CRITIC_CONTEXTS
    ]
    contexts = tuple(sorted({*taught, *possible}))
    return recipe, Request(contexts, k=k, limit=problems, seed=study.study.seeds[0])


def inspect_base(study: Study, folder: Path, commit: str | None, sum_up: SumUp) -> None:
    """Inspect the untrained model in folder/inspection, as far as that is not done."""
    asked, target = inspection_of(study), folder / "inspection"
    if asked is None:
        return
    if not (target / "inspection.json").exists():
        shutil.rmtree(target, ignore_errors=True)  # what a kill has left
        _inspect(*asked, target, commit)
    if not (target / "localisation.json").exists():
        sum_up(target)


def _inspect(recipe: Recipe, request: Request, target: Path, commit: str | None) -> None:
    from selfteach.commands.inspect.inspection import inspect, sampled
    from selfteach.trainer.build import build, set_threads

    set_threads(one_thread(recipe).train.threads)
    built = build(recipe)
    answers = sampled(built, recipe, request, built.task.problems("validation"))
    made = {**collect_provenance(), "model": recipe.model.path, "commit": commit}
    inspect(built, recipe, request, answers, target, made=made)


def sweep_jobs(study: Study, folder: Path) -> list[Job]:
    """Every arm (of every setting) × every rate × every seed of the sweep; test is never scored."""
    if study.sweep is None:
        raise RecipeError("the recipe has no [sweep]: add lr = [...] and seeds = [...]")
    jobs = []
    for variant in (None, *study.sweep.variants):
        arms = study.variants[variant].arms if variant else None
        for arm in arms or study.arms:
            for lr in study.sweep.lr:
                for seed in study.sweep.seeds:
                    over = {"optimizer": {"lr": lr}, "evaluation": {"test": False}}
                    recipe = study.recipe(arm, seed=seed, variant=variant, overrides=over)
                    name = f"{variant or 'runs'}/{arm}/lr_{lr:g}/seed_{seed}"
                    jobs.append(Job(variant, arm, seed, recipe, folder / name))
    return jobs


def run_sweep(study: Study, folder: Path, *, command: str, progress: Progress) -> dict[str, Any]:
    """Run the sweep and choose each arm's rate: the best mean validation Avg@k at the last step."""
    jobs = sweep_jobs(study, folder)
    with RunFolder(folder).lock():
        create_study(study, folder, command, "sweep")
        run_jobs(jobs, study.study.workers, progress)
    chosen: dict[str, Any] = {}
    for job in jobs:
        table = chosen.setdefault(job.variant or "main", {}).setdefault(job.arm, {"avg": {}})
        final = result_of(job.folder)["curve"]["avg"][-1]
        table["avg"].setdefault(f"{job.recipe.optimizer.lr:g}", {})[str(job.seed)] = final
    for arms in chosen.values():
        for table in arms.values():
            means = {lr: float(np.mean(list(v.values()))) for lr, v in table["avg"].items()}
            table["mean"] = means
            table["chosen"] = float(max(means, key=lambda lr: means[lr]))
    begun = read_json(folder / "study.json")
    result = {"settings": chosen, "command": command, "commit": begun["commit"]}
    write_json(folder / "sweep.json", result)
    return result
