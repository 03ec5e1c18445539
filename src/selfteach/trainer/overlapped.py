"""Nobody waits: while a step learns, the next one's answers are marked and later ones are sampled.

With ``train.staleness = 2``, and everything at its own pace::

    sampling   1   2   3   4   5   6   ...      step t is answered by the weights of
    marking        1   2   3   4   5   ...      max(0, t - 1 - staleness) updates: a function
    learning           1   2   3   4   ...      of t alone, so that a run can be repeated

Sampling is at most ``staleness`` steps ahead of learning, which bounds every queue: a critic that is
slow holds up sampling, one that is gone stops it. New weights are published when nobody samples with
the old ones, so a step's answers are all of one version. When they are published, the answers of the
next ``staleness`` steps are on disk: whoever takes the run up from there needs no old weights.

An engine that samples with the very module that is trained samples in this thread, between two
updates; only marking overlaps. An engine with weights of its own samples beside learning too.

Many ranks take the same steps in the same order, and only this thread of each speaks with the others:
a rank's own share is sampled and marked without them, and what failed on one fails on all when it is
waited for. So what is on disk when weights are published is on disk of every rank.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from itertools import islice
from typing import ParamSpec, TypeVar

from selfteach.runtime.futures import Later, Span, at_once, covered, later, timed
from selfteach.runtime.run_folder import RunFolder
from selfteach.trainer.metrics import Metrics
from selfteach.trainer.step import Components, RolloutRequest, ask, take_in
from selfteach.types import CritiquedRollout, TrainingSample

P = ParamSpec("P")
T = TypeVar("T")
Asked = TypeVar("Asked")
Done = TypeVar("Done")
Learned = tuple[list[TrainingSample], Metrics]
Safely = Callable[[], AbstractContextManager[None]]
"""Opens a stretch in which the process may be told to end."""
PHASES = ("rollout", "critique", "train")


def overlapped(
    begin: Callable[[int], Callable[[], Asked]],
    finish: Callable[[int, Callable[[], Asked]], Done],
    publish: Callable[[], None],
    steps: Iterable[int],
    staleness: int,
) -> Iterator[tuple[int, Done]]:
    """The order of things, whatever the things are.

    ``begin`` starts the sampling of a step and gives what waits for its end; ``finish`` waits, has the
    step marked and learns from it; ``publish`` puts the new weights where the next ``begin`` finds
    them. With ``staleness = 0`` each step is over before the next one begins.
    """
    ahead: deque[Callable[[], Asked]] = deque()
    coming = iter(steps := list(steps))
    for step in steps:
        for later_step in islice(coming, staleness + 1 - len(ahead)):
            ahead.append(begin(later_step))
        done = finish(step, ahead.popleft())
        for sampled in ahead:
            sampled()
        publish()
        yield step, done


def train_steps(
    components: Components,
    turns: Callable[[int], RolloutRequest],
    steps: Iterable[int],
    *,
    staleness: int = 0,
    journal: RunFolder | None = None,
    safely: Safely = nullcontext,
) -> Iterator[tuple[int, Learned]]:
    """Steps with their samples and metrics, as `step.train_step` takes them one by one.

    ``turns`` says who answers what in a step; it is asked when the step's sampling begins. When a
    step is yielded, its weights are published.
    """
    with ExitStack() as stack:
        mark_later = stack.enter_context(later(components.critic_threads))
        sample_later = stack.enter_context(later(1)) if components.samples_beside else at_once
        clock, agreed = Clock(), components.ranks.all_or_raise

        def begin(step: int) -> Callable[[], _Asked]:
            asked = _Asked()
            mark = _timing(mark_later, asked.marking)
            with clock("rollout"), safely():
                turn = turns(step)
                sampled = agreed(
                    lambda: sample_later(
                        timed, ask, asked.sampling, components, turn, mark, journal
                    )
                )

            def wait() -> _Asked:
                with clock("rollout", waits=components.samples_beside):
                    asked.batches = agreed(sampled)
                return asked

            return wait

        def finish(step: int, wait: Callable[[], _Asked]) -> Learned:
            with safely():
                asked = wait()
            beside = components.critic_threads > 0
            # A critic in this process may have swapped weights: not to be left in the middle.
            with clock("critique", waits=beside), (safely if beside else nullcontext)():
                critiqued = agreed(lambda: [said for batch in asked.batches for said in batch()])
            with clock("train"):
                samples, metrics = take_in(components, critiqued, step=step, journal=journal)
            return samples, {**metrics, **clock.row(asked.sampling, asked.marking)}

        def publish() -> None:
            components.engine.load_weights(
                components.policy.trainable.items(), components.policy.version
            )

        yield from overlapped(begin, finish, publish, steps, staleness)


class Clock:
    """Where this thread's seconds go, and how much of the work was done beside it."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        self._waiting = 0.0

    @contextmanager
    def __call__(self, phase: str, *, waits: bool = False) -> Iterator[None]:
        """A stretch spent on a phase, or on waiting for it while others work."""
        began = time.monotonic()
        try:
            yield
        finally:
            seconds = time.monotonic() - began
            self._seconds[phase] += seconds
            self._waiting += seconds if waits else 0.0

    def row(self, sampling: Iterable[Span], marking: Iterable[Span]) -> Metrics:
        """What to write down of a step, and the clock set to zero.

        ``time/*`` add up to the time of this thread since the last row. ``active_*`` are the seconds
        in which somebody was at work on this step's answers; ``waiting`` those in which this thread
        was not, and ``overlap`` is `overlap_of` them.
        """
        seconds, waiting = self._seconds, self._waiting
        self.__init__()
        busy = {
            "rollout": covered(sampling),
            "critique": covered(marking),
            "train": seconds["train"],
        }
        return {
            **{f"time/{phase}": seconds[phase] for phase in PHASES},
            **{f"active_{phase}": busy[phase] for phase in PHASES},
            "waiting": waiting,
            "overlap": overlap_of(list(busy.values()), sum(seconds.values())),
        }


def overlap_of(busy: Sequence[float], seconds: float) -> float:
    """How much of what could run side by side did: 0 is one after another, 1 is as long as the longest.

    ``busy`` are the seconds of each phase, ``seconds`` what they took together. Example: phases of 3, 2
    and 1 s that took 4 s have an overlap of (6 - 4) / (6 - 3) = 2/3.
    """
    could = sum(busy) - max(busy)
    return min(1.0, max(0.0, (sum(busy) - seconds) / could)) if could > 0 else 0.0


class _Asked:
    """A step that is being answered: its batches on their way to the critic, and when it was busy."""

    def __init__(self) -> None:
        self.batches: list[Callable[[], list[CritiquedRollout]]] = []
        self.sampling: list[Span] = []
        self.marking: list[Span] = []


def _timing(soon: Later, spans: list[Span]) -> Later:
    """The same, with the span of each call added to a list."""

    def timing(function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Callable[[], T]:
        return soon(timed, function, spans, *args, **kwargs)

    return timing
