"""Runs side by side: a process each, as many at a time as the machine bears, and what they share.

What only runs need, torch for one, takes seconds to import, and is imported in their processes.
"""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from selfteach.config.critic_section import CriticConfig, EndpointConfig
from selfteach.config.engine_section import VllmServerConfig
from selfteach.config.recipe import Recipe
from selfteach.config.schema import merge, validate
from selfteach.errors import CheckpointError, Terminated
from selfteach.runtime import gc_pause
from selfteach.runtime.run_folder import RunFolder
from selfteach.runtime.signals import EXIT_STATUS, handle_sigterm

GPU_DRIVERS = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")
"""Where Linux, WSL and ROCm have a driver; without one nobody needs to ask torch for a GPU."""
HUGE_PAGES = ("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
"""For runs' processes, where glibc allocates and Linux lets programs ask for huge pages: keys and
values of hundreds of answers lie on thousands of small ones, and finding these takes a tenth of
sampling's time."""
POLLED_S = 1.0
"""How often runs' folders are looked at, beside their ends."""
UNTRAINED = {"model", "data", "sampling", "evaluation", "engine", "seed"}
"""What the answers of an untrained model depend on, among a recipe's sections."""


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


Progress = Callable[[Sequence[Job]], None]
"""Called about every second while runs go on, to look at their folders."""


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
            pool.submit(_run, one_thread(job.recipe), job.folder, alike[job.folder])
            for job in waiting
        ]
        try:
            with handle_sigterm() as termination, termination.interruptible():
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
    from selfteach.trainer.loop import run_to_end

    try:
        run_to_end(recipe, folder, alike)
    except Terminated:
        os._exit(EXIT_STATUS)


def _require_servers(recipes: Sequence[Recipe]) -> None:
    """Ask who is served elsewhere, before another run spends anything."""
    critics = [c for c in distinct(r.critic for r in recipes) if isinstance(c, EndpointConfig)]
    engines = [own for own in by_engine(recipes) if isinstance(own.engine, VllmServerConfig)]
    if critics or engines:
        from selfteach.trainer.build_critic import require_critic
        from selfteach.trainer.build_engine import require_engine

        for critic in critics:
            require_critic(critic)
        for own in engines:
            require_engine(own)


def by_engine(recipes: Iterable[Recipe]) -> list[Recipe]:
    """One recipe for each engine and each model that it is given."""
    own = {recipe.model_dump_json(include={"engine", "model"}): recipe for recipe in recipes}
    return list(own.values())


def distinct(critics: Iterable[CriticConfig | None]) -> list[CriticConfig]:
    """Every critic once, in the order given."""
    found: list[CriticConfig] = []
    for critic in critics:
        if critic is not None and critic not in found:
            found.append(critic)
    return found


def one_thread(recipe: Recipe) -> Recipe:
    """Runs side by side take one thread each unless the recipe says otherwise."""
    if recipe.train.threads is not None:
        return recipe
    one = merge(recipe.model_dump(mode="json"), {"train": {"threads": 1}})
    return validate(Recipe, one, where="recipe")


def _end_with_parent(parent: int) -> None:
    """In a worker: end at once when the study's process is gone, so that a resume finds no one."""
    gc_pause.pause()

    import torch

    torch.set_num_threads(1)

    def watch() -> Iterator[None]:
        while os.getppid() == parent:
            time.sleep(0.2)
            yield
        os._exit(1)

    threading.Thread(target=lambda: list(watch()), daemon=True).start()
