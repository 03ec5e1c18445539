"""Run jobs in parallel: one process per run, as many at a time as the machine has room for.

This module must not import torch, which takes seconds: only the processes of the runs import it.
"""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from selfteach.commands.notes import mute_notes
from selfteach.config.recipe import Recipe
from selfteach.config.schema import merge, validate
from selfteach.errors import CheckpointError, RunStopped, Terminated
from selfteach.runtime import gc_pause
from selfteach.runtime.part_sources import require_same_sources_of_all, with_copies
from selfteach.runtime.run_folder import RunFolder
from selfteach.runtime.signals import blocked_interrupts, handle_termination
from selfteach.trainer.preflight import preflight

GPU_DRIVERS = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")
"""Device files of GPU drivers on Linux, WSL and ROCm; without one, torch need not be imported to look
for a GPU."""
HUGE_PAGES = ("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
"""Environment variable for the processes of runs: glibc then asks Linux for huge pages. The KV cache of
hundreds of rollouts covers thousands of small pages, whose lookup takes a tenth of sampling time."""
POLL_INTERVAL_S = 1.0
"""Seconds between progress updates while no run ends."""
ROLLOUT_SECTIONS = {"model", "data", "sampling", "evaluation", "engine", "seed"}
"""Recipe sections on which the rollouts of an untrained model depend."""


@dataclass(frozen=True, slots=True)
class Job:
    """Describes one run of a study: its arm, seed, recipe and folder."""

    variant: str | None
    arm: str
    seed: int
    recipe: Recipe
    folder: Path

    @property
    def label(self) -> str:
        """Return the arm's name, after the variant's where there is one."""
        return self.arm if self.variant is None else f"{self.variant}/{self.arm}"


JobsProgress = Callable[[Sequence[Job]], None]
"""Called about every second while runs are in progress; reads their folders."""


def run_jobs(
    jobs: Sequence[Job],
    workers: int | None,
    progress: JobsProgress,
    also: Callable[[], None] | None = None,
    folder: Path | None = None,
) -> None:
    """Run the incomplete jobs in parallel, each in a process with its recipe's threads (default: one).

    ``folder`` is the study's, where the sources of the user's own parts are recorded, or required.
    ``also`` is called first, in one of these processes. Raises the first error of a run once the runs
    in progress have ended; an error of ``also``, and `RunStopped` of a run that stopped itself, are
    raised after all jobs. First of all `preflight`
    checks servers and packages for the incomplete jobs.
    """
    waiting = [job for job in jobs if not RunFolder(job.folder).is_complete]
    recipes = [with_copies(job.recipe, job.folder, only_missing=True) for job in waiting]
    preflight(recipes, output_folders=[job.folder for job in waiting])
    if folder is not None:
        require_same_sources_of_all(folder, recipes)
    workers = min(workers or default_workers(waiting), len(waiting) + 1)
    with (
        _environment_variable(*HUGE_PAGES),
        concurrent.futures.ProcessPoolExecutor(
            workers, multiprocessing.get_context("spawn"), _exit_with_parent, (os.getpid(),)
        ) as pool,
    ):
        stopped: list[RunStopped] = []
        try:
            with handle_termination() as termination, termination.interruptible():
                with blocked_interrupts():  # this process ends its workers
                    extra, futures = _submitted(pool, jobs, waiting, also)
                pending = {*extra, *futures}
                while pending:
                    done, pending = concurrent.futures.wait(pending, timeout=POLL_INTERVAL_S)
                    progress(jobs)
                    for future in done.difference(extra):
                        try:
                            future.result()
                        except RunStopped as error:  # the others go on
                            stopped.append(error)
                for future in extra:
                    future.result()
        except Terminated:
            for worker in multiprocessing.active_children():
                worker.terminate()  # each saves a checkpoint
            raise
        except BrokenProcessPool:
            raise CheckpointError(
                "the process of a run was killed (out of memory?); continue with: selfteach resume OUT"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)
    if stopped:
        more = f" (and {len(stopped) - 1} other runs)" if len(stopped) > 1 else ""
        raise RunStopped(f"{stopped[0]}{more}")


def _submitted(
    pool: concurrent.futures.Executor,
    jobs: Sequence[Job],
    waiting: Sequence[Job],
    also: Callable[[], None] | None,
) -> tuple[list[concurrent.futures.Future[None]], list[concurrent.futures.Future[None]]]:
    """Submit ``also`` and the waiting jobs, which starts the pool's processes; return their futures."""
    extra = [pool.submit(also)] if also is not None else []
    donors = _same_initial_rollouts(jobs)
    runs = [
        pool.submit(_run, one_thread(job.recipe), job.folder, donors[job.folder]) for job in waiting
    ]
    return extra, runs


@contextmanager
def _environment_variable(name: str, value: str) -> Iterator[None]:
    """Set an environment variable for processes started meanwhile, unless it has a value already."""
    if name in os.environ:
        yield
        return
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]


def default_workers(jobs: Sequence[Job]) -> int:
    """Return how many runs go in parallel by default.

    One per core, and no more than fit the memory at their peaks; on a GPU one, which may fill it.
    """
    may_use_gpu = any(job.recipe.model.device in ("auto", "cuda") for job in jobs)
    if may_use_gpu and any(Path(driver).exists() for driver in GPU_DRIVERS):
        import torch  # takes seconds: only on machines that may have a GPU

        if torch.cuda.is_available():
            return 1
    cores = os.cpu_count() or 1
    return min([cores, *_fitting_runs([job.recipe for job in jobs])])


def _fitting_runs(recipes: Sequence[Recipe]) -> Iterator[int]:
    """Yield how many runs of each kind the memory holds; nothing for the lab's models, all small."""
    kinds = {recipe.model_dump_json(exclude={"seed"}): recipe for recipe in recipes}
    for recipe in kinds.values():
        if not recipe.model.path.startswith("lab:"):
            from selfteach.trainer.device_load import fitting_runs  # imports torch

            if (runs := fitting_runs(recipe)) is not None:
                yield runs


def _same_initial_rollouts(jobs: Sequence[Job]) -> dict[Path, list[Path]]:
    """Map each run folder to those of the other runs with the same initial model, seed and problems."""
    keys = {job.folder: job.recipe.model_dump_json(include=ROLLOUT_SECTIONS) for job in jobs}
    folders: dict[str, list[Path]] = {}
    for folder, key in keys.items():
        folders.setdefault(key, []).append(folder)
    return {folder: [o for o in folders[key] if o != folder] for folder, key in keys.items()}


def _run(recipe: Recipe, folder: Path, same_start: Sequence[Path]) -> None:
    """Run a recipe to its end in a worker process; exit at once on SIGTERM, all being saved."""
    from selfteach.trainer.loop import run_to_end

    try:
        run_to_end(recipe, folder, same_start)
    except Terminated as end:
        os._exit(end.status)


def one_thread(recipe: Recipe) -> Recipe:
    """Return the recipe with ``train.threads = 1`` unless it sets a number of threads."""
    if recipe.train.threads is not None:
        return recipe
    values = merge(recipe.model_dump(mode="json"), {"train": {"threads": 1}})
    return validate(Recipe, values, where="recipe")


def _exit_with_parent(parent: int) -> None:
    """Exit this worker when the study's process has ended, so that no worker is left at a resume."""
    gc_pause.pause()
    mute_notes()  # the study's process has printed them

    import torch

    torch.set_num_threads(1)

    def watch() -> Iterator[None]:
        while os.getppid() == parent:
            time.sleep(0.2)
            yield
        os._exit(1)

    threading.Thread(target=lambda: list(watch()), daemon=True).start()
