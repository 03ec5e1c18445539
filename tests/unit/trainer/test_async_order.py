"""The order of things under any interleaving and any kill: nothing is lost, nothing counts twice."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selfteach.errors import Terminated
from selfteach.runtime.futures import covered_seconds
from selfteach.runtime.signals import handle_termination
from selfteach.trainer.async_training import pipelined
from selfteach.trainer.phase_clock import overlap_of


class Killed(Exception):
    """As by kill -9: what is in memory is gone."""


class World:
    """A run whose weights are the history of what they learned from; threads run when a script says."""

    def __init__(self, steps: int, staleness: int, every: int, beside: bool) -> None:
        self.steps, self.staleness, self.every, self.beside = steps, staleness, every, beside
        self.answers: dict[int, Any] = {}  # on disk, as are the next three
        self.marks: dict[int, Any] = {}
        self.saved: tuple[int, Any] = (0, ())
        self.sampled, self.paid = list[int](), list[int]()
        self.most_ahead = 0

    def run(self, choose: Callable[[int], int], kill_at: int | None) -> None:
        """To the end or to a kill. ``choose(n)`` picks one of n at every moment."""
        done, weights = self.saved
        published = [weights]
        pending: list[Callable[[], None]] = []  # threads' work, not done yet
        moments = 0

        def moment() -> None:
            nonlocal moments
            moments += 1
            if moments == kill_at:
                raise Killed
            while pending and choose(2):
                pending.pop(0)()

        def begin(step: int) -> Callable[[], int]:
            self.most_ahead = max(self.most_ahead, step - len(published[0]) - 1)
            version = max(0, step - 1 - self.staleness)

            def sample() -> None:
                if step not in self.answers:
                    assert len(published[0]) == version, "other weights than were to answer"
                    self.sampled.append(step)
                    self.answers[step] = (step, published[0])
                pending.append(mark)

            def mark() -> None:
                if step not in self.marks:
                    self.paid.append(step)
                    self.marks[step] = self.answers[step]

            moment()
            if self.beside:
                pending.append(sample)
            else:
                sample()

            def wait() -> int:
                while step not in self.answers:
                    pending.pop(0)()
                return step

            return wait

        def take(wait: Callable[[], int], wait_for_started: Callable[[], None]) -> None:
            nonlocal weights
            moment()
            step = wait()
            while step not in self.marks:
                pending.pop(0)()
            moment()
            weights = (*weights, hash((weights, self.marks[step])))
            wait_for_started()
            moment()
            published[0] = weights

        def wait(started: Callable[[], int]) -> None:
            started()

        steps = range(done + 1, self.steps + 1)
        for step, _ in pipelined(begin, take, wait, steps, self.staleness):
            moment()
            if step % self.every == 0 or step == self.steps:
                for ahead in range(step + 1, min(step + self.staleness, self.steps) + 1):
                    assert ahead in self.answers, "a checkpoint whose next answers are not on disk"
                self.saved = step, weights


def expected(steps: int, staleness: int) -> tuple:
    """The weights at the end, by the definition alone."""
    weights = [()]
    for step in range(1, steps + 1):
        answers = (step, weights[max(0, step - 1 - staleness)])
        weights.append((*weights[-1], hash((weights[-1], answers))))
    return weights[-1]


@settings(deadline=None, max_examples=300)
@given(
    steps=st.integers(1, 7), staleness=st.integers(0, 3), every=st.integers(1, 3),
    beside=st.booleans(), kills=st.lists(st.integers(1, 25), max_size=4), data=st.data(),
)  # fmt: skip
def test_no_interleaving_and_no_kill_loses_or_doubles_a_step(
    steps: int, staleness: int, every: int, beside: bool, kills: list[int], data: st.DataObject
) -> None:
    world = World(steps, staleness, every, beside)

    def choose(n: int) -> int:
        return data.draw(st.integers(0, n - 1))

    for kill_at in kills:
        try:
            world.run(choose, kill_at)
        except Killed:
            continue
    world.run(choose, None)
    assert world.saved == (steps, expected(steps, staleness))
    assert sorted(world.sampled) == sorted(world.paid) == list(range(1, steps + 1))
    assert world.most_ahead <= staleness


def test_without_staleness_each_step_is_over_before_the_next_begins() -> None:
    seen: list[tuple[str, int]] = []

    def begin(step: int) -> Callable[[], int]:
        seen.append(("begin", step))
        return lambda: step

    def take(wait: Callable[[], int], wait_for_started: Callable[[], None]) -> None:
        seen.append(("take", wait()))
        wait_for_started()
        seen.append(("publish", 0))

    def wait(started: Callable[[], int]) -> None:
        raise AssertionError("nothing is started ahead")

    for step, _ in pipelined(begin, take, wait, [1, 2], 0):
        seen.append(("yielded", step))
    one = [("begin", 1), ("take", 1), ("publish", 0), ("yielded", 1)]
    assert seen == [*one, *((name, 2 if at else 0) for name, at in one)]


@pytest.mark.parametrize(
    "busy, seconds, overlap",
    [((3.0, 2.0, 1.0), 6.0, 0.0), ((3.0, 2.0, 1.0), 3.0, 1.0), ((3.0, 2.0, 1.0), 4.0, 2 / 3),
     ((3.0, 0.0, 0.0), 3.0, 0.0), ((3.0, 2.0, 1.0), 9.0, 0.0)],
)  # fmt: skip
def test_overlap_by_hand(busy: tuple[float, ...], seconds: float, overlap: float) -> None:
    assert overlap_of(busy, seconds) == pytest.approx(overlap)


def test_seconds_that_spans_share_count_once() -> None:
    assert covered_seconds([(5.0, 6.0), (0.0, 2.0), (1.0, 3.0), (1.5, 2.5)]) == 4.0
    assert covered_seconds([]) == 0.0


def test_sigterm_waits_for_a_safe_moment() -> None:
    reached = []
    with handle_termination() as termination:
        signal.raise_signal(signal.SIGTERM)
        reached.append("still here")
        with pytest.raises(Terminated), termination.interruptible():
            reached.append("never")
    with (
        handle_termination() as termination,
        pytest.raises(Terminated),
        termination.interruptible(),
    ):
        signal.raise_signal(signal.SIGTERM)
        reached.append("never")
    assert reached == ["still here"]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
