"""Measure the seconds of training steps and of their phases, and the peak memory of the device.

A phase ends when the device has ended its work. A step that waits for that launches nothing ahead, and
takes longer. So on a GPU whole steps are timed with nothing in between, and phases in one more step
(`Clock.by_phase`). A CPU has no queue: there each step has its phases.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

PHASES = ("sampling", "teacher", "student", "optimizer")
"""Exclusive phases: sampling; the teacher's passes; the student's passes, both heads' logits and the
loss, forward and backward; clipping and the update. The rest of a step is verdicts, contexts, batches
and metrics."""


def synchronized_time() -> float:
    """Return the time after the device has finished its queue."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(call: Callable[[], object]) -> float:
    """Return the seconds of a call, its work on the device included."""
    start = synchronized_time()
    call()
    return synchronized_time() - start


def device_bytes(before: int | None = None) -> int:
    """Reset the peak and return the allocated bytes; or the peak beyond ``before``. 0 without CUDA."""
    if not torch.cuda.is_initialized():
        return 0
    if before is not None:
        return torch.cuda.max_memory_allocated() - before
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


class Clock:
    """Collects the seconds of steps, and of their phases."""

    def __init__(self) -> None:
        self.by_phase = False
        """On a GPU: the present step is there for its phases, and does not count as a whole one."""
        self.peak = 0
        """On CUDA: peak bytes of a step beyond what was allocated at its start."""
        self.before = 0.0
        """Seconds of the step that `end` is not passed."""
        self.steps: list[dict[str, float]] = []
        self._by_phase: list[dict[str, float]] = []
        self._current: dict[str, float] = {}
        self._inner = 0.0

    @property
    def counts_phases(self) -> bool:
        """Return whether phases of the present step are counted."""
        return self.by_phase or not torch.cuda.is_initialized()

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Count the seconds spent inside for this phase, except those of a nested phase."""
        if not self.counts_phases:
            yield
            return
        outer, self._inner = self._inner, 0.0
        start = synchronized_time()
        try:
            yield
        finally:
            seconds = synchronized_time() - start
            self.add(phase, seconds - self._inner)
            self._inner = outer + seconds

    def timed(self, phase: str, function: Callable) -> Callable:
        """Return the function, timed as a phase."""

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            with self(phase):
                return function(*args, **kwargs)

        return wrapper

    def add(self, phase: str, seconds: float) -> None:
        """Add seconds to a phase."""
        self._current[phase] = self._current.get(phase, 0.0) + seconds

    def end(self, seconds: float) -> None:
        """End a step that took ``seconds`` and those in ``before``."""
        total = self.before + seconds
        row = {**self._current, "rest": total - sum(self._current.values()), "step": total}
        (self._by_phase if self.by_phase else self.steps).append(row)
        self._current, self.before = {}, 0.0

    def medians(self, skip: int = 1) -> dict[str, float]:
        """Return median seconds of the whole steps after the first ``skip``, and of their phases."""
        whole = self.steps[skip:]
        rows = self._by_phase or whole
        names = dict.fromkeys(name for row in rows for name in row)
        medians = {n: statistics.median(row.get(n, 0.0) for row in rows) for n in names}
        return medians | {"step": statistics.median(row["step"] for row in whole)}


def steps_by_phase() -> int:
    """Return how many steps a measurement needs for its phases alone: one on a GPU."""
    return int(torch.cuda.is_initialized())
