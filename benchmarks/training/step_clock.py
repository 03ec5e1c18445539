"""Seconds of a training step by phase, and the bytes that a device held meanwhile."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

PHASES = ("sampling", "teacher", "student", "optimizer")
"""Timed where they happen, each without what another one takes inside it: an engine's answers; the
teacher's passes; the student's passes, both heads' logits and the loss, forward and backward; clipping
and the update. The rest of a step is what is around: verdicts, contexts, batches, metrics."""


def instant() -> float:
    """The time at which a device has done what it was told so far."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def held_bytes(before: int | None = None) -> int:
    """Bytes of the device that are taken now; or the most that were, beyond what was ``before``."""
    if not torch.cuda.is_initialized():
        return 0
    if before is not None:
        return torch.cuda.max_memory_allocated() - before
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


class Clock:
    """Seconds of a step, by phase."""

    def __init__(self) -> None:
        self.peak = 0
        """On CUDA: the most bytes that a step held beyond what was there when it began."""
        self.begun = 0.0
        """Seconds of the step before `end` measures it."""
        self.steps: list[dict[str, float]] = []
        self._now: dict[str, float] = {}
        self._inner = 0.0

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Seconds spent inside are this phase's, but for those of a phase inside it."""
        before, self._inner = self._inner, 0.0
        began = instant()
        try:
            yield
        finally:
            spent = instant() - began
            self.add(phase, spent - self._inner)
            self._inner = before + spent

    def around(self, phase: str, function: Callable) -> Callable:
        """The same function, timed."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self(phase):
                return function(*args, **kwargs)

        return timed

    def add(self, phase: str, seconds: float) -> None:
        """Seconds that a phase has taken."""
        self._now[phase] = self._now.get(phase, 0.0) + seconds

    def end(self, seconds: float) -> None:
        """A step is over, which took so long and what had begun it."""
        self.steps.append({**self._now, "step": self.begun + seconds})
        self._now, self.begun = {}, 0.0

    def medians(self, skip: int = 1) -> dict[str, float]:
        """Per phase, over the steps after the first ``skip``."""
        rows = self.steps[skip:]
        names = dict.fromkeys(name for row in rows for name in row)
        return {n: statistics.median(row.get(n, 0.0) for row in rows) for n in names}
