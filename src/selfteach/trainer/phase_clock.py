"""Measure how long the phases of a step take, and how far they overlap."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from selfteach.runtime.futures import Span, covered_seconds
from selfteach.trainer.metrics import Metrics

PHASES = ("rollout", "critique", "train")


@dataclass(slots=True)
class ActiveSpans:
    """Holds when a step was being sampled, and when it was being critiqued."""

    rollout: list[Span] = field(default_factory=list)
    critique: list[Span] = field(default_factory=list)


class PhaseClock:
    """Measures where the main thread's time goes, and how much work was done in the background."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        self._waiting = 0.0

    @contextmanager
    def __call__(self, phase: str, *, waits: bool = False) -> Iterator[None]:
        """Measure a block spent on a phase; with ``waits``, on waiting for background threads."""
        began = time.monotonic()
        try:
            yield
        finally:
            seconds = time.monotonic() - began
            self._seconds[phase] += seconds
            self._waiting += seconds if waits else 0.0

    @contextmanager
    def training(self) -> Iterator[None]:
        """Measure a step; time outside its other phases counts as training."""
        others = self._seconds["rollout"] + self._seconds["critique"]
        began = time.monotonic()
        try:
            yield
        finally:
            others = self._seconds["rollout"] + self._seconds["critique"] - others
            self._seconds["train"] += time.monotonic() - began - others

    def row(self, active: ActiveSpans) -> Metrics:
        """Return the metrics of a step, and reset the clock.

        ``time/*`` add up to this thread's seconds since the last row. ``active_*`` are the seconds in
        which work was done on this step's rollouts in any thread; ``waiting`` those in which this
        thread waited for it; ``overlap`` is `overlap_of` them.
        """
        seconds, waiting = self._seconds, self._waiting
        self.__init__()
        active_seconds = {
            "rollout": covered_seconds(active.rollout),
            "critique": covered_seconds(active.critique),
            "train": seconds["train"],
        }
        return {
            **{f"time/{phase}": seconds[phase] for phase in PHASES},
            **{f"active_{phase}": active_seconds[phase] for phase in PHASES},
            "waiting": waiting,
            "overlap": overlap_of(list(active_seconds.values()), sum(seconds.values())),
        }


def overlap_of(active: Sequence[float], seconds: float) -> float:
    """Compute the overlap of phases: 0 is sequential, 1 takes only as long as the longest phase.

    ``active`` are the seconds of each phase, ``seconds`` what they took together. Example: phases of
    3, 2 and 1 s that took 4 s have an overlap of (6 - 4) / (6 - 3) = 2/3.
    """
    possible = sum(active) - max(active)
    return min(1.0, max(0.0, (sum(active) - seconds) / possible)) if possible > 0 else 0.0
