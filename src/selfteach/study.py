"""Arms × seeds under one recipe: every run in a folder of its own, one results.json, one report.

What only runs need, torch for one, takes seconds to import, and is imported in their processes.
"""

from __future__ import annotations

import concurrent.futures
import datetime
import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from selfteach.config import CRITIC_CONTEXTS, Recipe
from selfteach.config_critic import CriticConfig, EndpointConfig
from selfteach.config_engine import VllmServerConfig
from selfteach.environment import environment
from selfteach.errors import CheckpointError, RecipeError, Terminated
from selfteach.estimates import Interval, bootstrap_difference, bootstrap_mean
from selfteach.evaluation import evaluation_of
from selfteach.recipes import BASE, Study, pairs
from selfteach.run_folder import RunFolder, read_json, require_empty, result_of, write_json
from selfteach.settings import merge, validate
from selfteach.termination import STATUS, listening

if TYPE_CHECKING:
    from selfteach.inspection.request import Request

GPU_DRIVERS = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")
"""Where Linux, WSL and ROCm have a driver; without one nobody needs to ask torch for a GPU."""
MEASURES = ("avg", "pass", "maj", "length", "truncated", "format")
COMPARED = ("avg", "pass", "maj", "length")
INSPECTED = 512
"""Answers that a study inspects by default."""
CONTROLS = ("reference", "aligned_reference", "answer_only", "shuffled_lines", "other_answer")
"""Contexts under which a study's untrained model is inspected beside those of the arms."""
MARKED_BY_PROGRAM = ("lab", "chain_sums")
"""Kinds of data whose answers a program can mark."""
HUGE_PAGES = ("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
"""For runs' processes, where glibc allocates and Linux lets programs ask for huge pages: keys and
values of hundreds of answers lie on thousands of small ones, and finding these takes a tenth of
sampling's time."""
POLLED_S = 1.0
"""How often runs' folders are looked at, beside their ends."""
UNTRAINED = {"model", "data", "sampling", "evaluation", "engine", "seed"}
"""What the answers of an untrained model depend on, among a recipe's sections."""
COLLAPSED_BELOW = 0.5
"""A run is marked as collapsed when it ends below this share of the base's Avg@k."""


@dataclass(frozen=True, slots=True)
class Job:
    """One run of a study."""

    variant: str | None
    arm: str
    seed: int
    recipe: Recipe
    folder: Path

    @property
    def label(self) -> str:
        """The arm, and the variant where there is one."""
        return self.arm if self.variant is None else f"{self.variant}/{self.arm}"


Kind = Literal["study", "sweep"]

Progress = Callable[[Sequence[Job]], None]
"""Called about every second while runs go on, to look at their folders."""
SumUp = Callable[[Path], None]
"""What is made of an inspection's folder when it is complete."""


def create_study(study: Study, folder: Path, command: str, kind: Kind) -> None:
    """Begin a study (or sweep) here. Raises `CheckpointError` if the folder holds something else."""
    marker = folder / "study.json"
    plain = study.model_dump(mode="json")
    if marker.exists():
        saved = read_json(marker)
        if (_as_now(saved["study"]), saved.get("kind")) != (plain, kind):
            raise CheckpointError(
                f"{folder} holds another study; choose another --out, "
                f"or go on with that one: selfteach resume {folder}"
            )
        return
    require_empty(folder)
    write_json(marker, {"kind": kind, "study": plain, "command": command, **environment()})


def _as_now(plain: dict[str, Any]) -> dict[str, Any] | None:
    """A study of an earlier version with what studies have had since; None for what is none."""
    try:
        return validate(Study, plain).model_dump(mode="json")
    except RecipeError:
        return None


def load_existing(folder: Path) -> tuple[Study, str, Kind]:
    """The study that a folder holds, the command that began it, and whether it is a sweep."""
    saved = read_json(folder / "study.json")
    return validate(Study, saved["study"], where=str(folder)), saved["command"], saved["kind"]


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
        earlier = folder / "results.json"
        spent = read_json(earlier)["made"]["seconds"] if earlier.exists() else 0.0
        results = gather(study, jobs, {**made, "seconds": spent + time.monotonic() - started})
        write_json(folder / "results.json", results)
    return results


def run_jobs(
    jobs: Sequence[Job],
    workers: int | None,
    progress: Progress,
    beside: Callable[[], None] | None = None,
) -> None:
    """Run jobs side by side, each in a process with as many threads as its recipe says (or one).

    The call ``beside`` is made in one of these processes, first. Raises the first error of a run; the
    others that are under way end first. What goes wrong beside them is raised when all are done.
    """
    waiting = [job for job in jobs if not RunFolder(job.folder).is_complete]
    _require_servers([job.recipe for job in waiting])
    workers = min(workers or side_by_side(waiting), len(waiting) + 1)
    with (
        _set(*HUGE_PAGES),
        concurrent.futures.ProcessPoolExecutor(
            workers, multiprocessing.get_context("spawn"), _end_with_parent, (os.getpid(),)
        ) as pool,
    ):
        besides = [pool.submit(beside)] if beside is not None else []
        alike = _beginning_alike(jobs)
        futures = [
            pool.submit(_run, _one_thread(job.recipe), job.folder, alike[job.folder])
            for job in waiting
        ]
        try:
            with listening() as termination, termination.safe():
                pending = {*besides, *futures}
                while pending:
                    done, pending = concurrent.futures.wait(pending, timeout=POLLED_S)
                    progress(jobs)
                    for future in done.difference(besides):
                        future.result()
                for future in besides:
                    future.result()
        except Terminated:
            for worker in multiprocessing.active_children():
                worker.terminate()  # each saves what it has learned
            raise
        except BrokenProcessPool:
            raise CheckpointError(
                "a run's process was killed (out of memory?); selfteach resume goes on from there"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


@contextmanager
def _set(name: str, value: str) -> Iterator[None]:
    """A variable of the environment for processes that are begun meanwhile; another's value stays."""
    if name in os.environ:
        yield
        return
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]


def side_by_side(jobs: Sequence[Job]) -> int:
    """Runs at a time where a study does not say: one per core; on a GPU one, which may fill it."""
    asked = any(job.recipe.model.device in ("auto", "cuda") for job in jobs)
    if asked and any(Path(driver).exists() for driver in GPU_DRIVERS):
        import torch  # seconds, for machines that may have one

        if torch.cuda.is_available():
            return 1
    return os.cpu_count() or 1


def _beginning_alike(jobs: Sequence[Job]) -> dict[Path, list[Path]]:
    """The folders of the other runs that begin with the same model, seed and problems, for each."""
    begin = {job.folder: job.recipe.model_dump_json(include=UNTRAINED) for job in jobs}
    alike: dict[str, list[Path]] = {}
    for folder, own in begin.items():
        alike.setdefault(own, []).append(folder)
    return {folder: [o for o in alike[own] if o != folder] for folder, own in begin.items()}


def _run(recipe: Recipe, folder: Path, alike: Sequence[Path]) -> None:
    """In a worker: a run to its end, or to the worker's."""
    from selfteach.train import run_to_end

    try:
        run_to_end(recipe, folder, alike)
    except Terminated:
        os._exit(STATUS)


def _require_servers(recipes: Sequence[Recipe]) -> None:
    """Ask who is served elsewhere, before another run spends anything."""
    critics = [c for c in _distinct(r.critic for r in recipes) if isinstance(c, EndpointConfig)]
    engines = [own for own in _by_engine(recipes) if isinstance(own.engine, VllmServerConfig)]
    if critics or engines:
        from selfteach.build_critic import require_critic
        from selfteach.build_engine import require_engine

        for critic in critics:
            require_critic(critic)
        for own in engines:
            require_engine(own)


def critics_of(study: Study) -> list[CriticConfig]:
    """Every critic that a study asks, once."""
    return _distinct(recipe.critic for recipe in _recipes(study))


def engines_of(study: Study) -> list[Recipe]:
    """One recipe for each engine that a study samples from and each model that it gives it."""
    return _by_engine(_recipes(study))


def _by_engine(recipes: Iterable[Recipe]) -> list[Recipe]:
    own = {recipe.model_dump_json(include={"engine", "model"}): recipe for recipe in recipes}
    return list(own.values())


def _recipes(study: Study) -> Iterator[Recipe]:
    settings = [(None, list(study.arms)), *((n, v.arms) for n, v in study.variants.items())]
    for name, arms in settings:
        for arm in arms or study.arms:
            yield study.recipe(arm, variant=name)


def _distinct(critics: Iterable[CriticConfig | None]) -> list[CriticConfig]:
    found: list[CriticConfig] = []
    for critic in critics:
        if critic is not None and critic not in found:
            found.append(critic)
    return found


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


def inspection_of(study: Study) -> tuple[Recipe, Request] | None:
    """How a study's untrained model is inspected; None where it is not.

    Under the contexts of the main setting's arms and `CONTROLS`, in as far as they need nothing that
    the arms have not. The answers are marked by a program where there is one (erring as in the first
    arm that has it); a critic that writes is asked only if ``study.inspect_answers`` says how often.
    """
    from selfteach.inspection.request import Request

    arms = [study.recipe(arm, seed=study.study.seeds[0]) for arm in study.arms]
    taught = {own.context.label for own in arms} - {"none"}
    model = next((own for own in arms if own.critic is not None), arms[0])
    wanted, programs = study.study.inspect_answers, model.data.type in MARKED_BY_PROGRAM
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
    from selfteach.build import build, set_threads
    from selfteach.inspection.request import inspect, sampled

    set_threads(_one_thread(recipe).train.threads)
    built = build(recipe)
    answers = sampled(built, recipe, request, built.task.problems("validation"))
    made = {**environment(), "model": recipe.model.path, "commit": commit}
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


def _one_thread(recipe: Recipe) -> Recipe:
    """Runs side by side take one thread each unless the recipe says otherwise."""
    if recipe.train.threads is not None:
        return recipe
    one = merge(recipe.model_dump(mode="json"), {"train": {"threads": 1}})
    return validate(Recipe, one, where="recipe")


def _end_with_parent(parent: int) -> None:
    """In a worker: end at once when the study's process is gone, so that a resume finds no one."""
    import torch

    torch.set_num_threads(1)

    def watch() -> Iterator[None]:
        while os.getppid() == parent:
            time.sleep(0.2)
            yield
        os._exit(1)

    threading.Thread(target=lambda: list(watch()), daemon=True).start()
