"""Samplers, critics and trainers side by side, simulated event by event (SimPy).

Step t is sampled batch by batch; a batch's answers go to the critic once the whole batch is there, and
the step is learned when all its answers are marked. Weights that sample step t have seen at least
t − s updates (s the staleness limit): with s = 0 each step waits for the one before. Components that share
devices take turns, the older step first. Time is in seconds.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import simpy

from selfteach.planning.costs import Decoding
from selfteach.planning.lengths import Spread
from selfteach.planning.workload import Marker

Process = Generator[simpy.Event, Any, None]


@dataclass(frozen=True, slots=True)
class Line:
    """Who does what, and how fast."""

    batches: Sequence[int]
    """Answers in each batch of a step."""
    samples: int
    """Answers to one question: their prompt is read once."""
    prompt: float
    answer: Spread
    sampler: Decoding
    samplers: int
    """Replicas."""
    learn: Callable[[np.ndarray], float]
    """Seconds of a step from the lengths of its answers."""
    publish: float = 0.0
    """Seconds until samplers have new weights."""
    wake: float = 0.0
    """Seconds that an engine takes to give way and to come back, once a step."""
    staleness: int = 0
    samplers_share: bool = False
    """Sampling and learning take turns on the same devices."""
    marker: Marker = "nobody"
    critic: Decoding | None = None
    critics: int = 1
    """Replicas."""
    critics_share: bool = False
    """Marking takes turns with learning."""
    critic_prompt: float = 0.0
    critique: Spread | None = None
    latency: float = 0.0
    """Seconds of a reply (``latency``) or of an answer (``program``)."""
    concurrency: int = 1
    """Requests at a time."""
    queue: int = 256
    """Answers that may wait for the critic; sampling goes on when there is room again."""


@dataclass(frozen=True, slots=True)
class Step:
    """When the parts of a step began and ended, in seconds since the start."""

    begun: float
    sampled: float
    critiqued: float
    learning: float
    learned: float
    """New weights are with the samplers."""


@dataclass(frozen=True, slots=True)
class Timeline:
    """What came of it."""

    steps: tuple[Step, ...]
    period: float
    """Seconds from one step to the next, once the pipeline is full."""
    busy: dict[str, float]
    """Share of the time that samplers, critics and trainers work, from 0 to 1, in that stretch."""

    def mean(self, start: str, end: str) -> float:
        """Mean seconds between two moments of a step."""
        spans = [getattr(step, end) - getattr(step, start) for step in self.steps]
        return sum(spans) / len(spans)


def simulate(line: Line, *, steps: int = 8, seed: int = 0) -> Timeline:
    """So many steps with lengths drawn by ``seed``, and others before and after them, so that the
    pipeline is full from the first to the last."""
    ahead = 1 + line.staleness
    shop = _Shop(line, ahead + steps + ahead, np.random.default_rng(seed))
    first = shop.run(until=ahead)
    worked = dict(shop.worked())
    last = shop.run(until=ahead + steps)
    spent = max(last - first, 1e-12)
    busy = {name: (total - worked[name]) / spent for name, total in shop.worked().items()}
    return Timeline(tuple(shop.steps[ahead : ahead + steps]), spent / steps, busy)


class _Replica:
    """An engine: answers join between passes, leave when they end, and share its time meanwhile."""

    def __init__(self, env: simpy.Environment, cost: Decoding) -> None:
        self._env, self._cost = env, cost
        self._waiting: deque[tuple[float, float, float, simpy.Event]] = deque()
        self._ends: list[tuple[float, int, float, simpy.Event]] = []
        self._passes, self._context, self._number = 0.0, 0.0, 0
        self._call = env.event()
        self.worked = 0.0
        env.process(self._run())

    def submit(self, read: float, context: float, tokens: float) -> simpy.Event:
        """An answer of so many tokens after a prompt of which ``read`` are not in the cache yet."""
        done = self._env.event()
        self._waiting.append((read, context, tokens, done))
        if not self._call.triggered:
            self._call.succeed()
        return done

    def _run(self) -> Process:
        while True:
            read = self._admit()
            if not self._ends:
                self._call = self._env.event()
                yield self._call
                continue
            if read:
                self.worked += read
                yield self._env.timeout(read)
            yield from self._decode()

    def _admit(self) -> float:
        """Let in who has room; seconds to read their prompts."""
        read = 0.0
        while self._waiting and len(self._ends) < self._cost.slots:
            prompt, context, tokens, done = self._waiting.popleft()
            read += prompt * self._cost.prefill
            self._context += context
            self._number += 1
            end = self._passes + tokens
            heapq.heappush(self._ends, (end, self._number, context + tokens, done))
        return read

    def _decode(self) -> Process:
        """Until the next answer ends, or another comes that has room."""
        rows, ahead = len(self._ends), max(0.0, self._ends[0][0] - self._passes)
        each = self._cost.pass_seconds(rows, self._context + rows * ahead / 2)
        start = self._env.now
        due = self._env.timeout(ahead * each)
        if rows < self._cost.slots:
            if not self._waiting:
                self._call = self._env.event()
            yield due | self._call
        else:
            yield due
        spent = self._env.now - start
        self.worked += spent
        passes = ahead if due.processed else min(ahead, spent / each)
        self._passes += passes
        self._context += rows * passes
        while self._ends and self._ends[0][0] <= self._passes + 1e-9:
            _, _, held, done = heapq.heappop(self._ends)
            self._context -= held
            done.succeed()


@dataclass
class _Shop:
    """The simulation's state."""

    line: Line
    count: int
    random: np.random.Generator
    steps: list[Step] = field(default_factory=list)

    def __post_init__(self) -> None:
        line = self.line
        self.env = env = simpy.Environment(0.0)
        self.device = simpy.PriorityResource(env)
        self.requests = simpy.Resource(env, max(1, line.concurrency))
        self.room = simpy.Resource(env, max(1, line.queue))
        self.samplers = [_Replica(env, line.sampler) for _ in range(line.samplers)]
        served = line.critic is not None
        self.critics = [_Replica(env, line.critic) for _ in range(line.critics if served else 0)]  # type: ignore[arg-type]
        self.sampled = [env.event() for _ in range(self.count)]
        self.critiqued = [env.event() for _ in range(self.count)]
        self.learned = [env.event() for _ in range(self.count)]
        self.missing = [sum(line.batches)] * self.count
        self.lengths = [line.answer.draw(self.random, sum(line.batches)) for _ in self.missing]
        self.asked, self.learning, self.marking = 0, 0.0, 0.0
        env.process(self._sample_all())
        env.process(self._learn_all())

    def run(self, until: int) -> float:
        """Go on until so many steps are learned; the time."""
        self.env.run(until=self.learned[until - 1])
        return self.env.now

    def worked(self) -> dict[str, float]:
        """Seconds that each kind of part has worked so far, a part of it on average."""
        samplers = sum(replica.worked for replica in self.samplers) / len(self.samplers)
        marking = self.marking / max(1, self.line.concurrency)
        if self.critics:
            marking = sum(replica.worked for replica in self.critics) / len(self.critics)
        elif self.line.marker == "program":
            marking = self.marking
        return {"samplers": samplers, "critics": marking, "trainers": self.learning}

    @contextmanager
    def _turn(self, shares: bool, step: int) -> Any:
        """A turn on the shared devices, or nothing to wait for."""
        if not shares:
            yield self.env.timeout(0)
            return
        with self.device.request(priority=step) as turn:
            yield turn

    def _sample_all(self) -> Process:
        line, env = self.line, self.env
        for step in range(self.count):
            if step > line.staleness:
                yield self.learned[step - line.staleness - 1]
            first, begun = 0, env.now
            for number, size in enumerate(line.batches):
                with self._turn(line.samplers_share, step) as turn:
                    yield turn
                    if number == 0:
                        begun = env.now
                        yield env.timeout(line.wake)
                    yield env.all_of(self._generate(self.lengths[step][first : first + size]))
                # A program, and a critic that waits for its turn, begin when all is sampled.
                beside = line.marker in ("served", "latency") and not line.critics_share
                places = [self.room.request() for _ in range(size if beside else 0)]
                yield env.all_of(places)
                env.process(self._mark(step, first, size, places))
                first += size
            self.steps.append(Step(begun, env.now, 0.0, 0.0, 0.0))
            self.sampled[step].succeed()

    def _generate(self, lengths: np.ndarray) -> list[simpy.Event]:
        """Answers to whole questions, dealt out to the samplers in turn."""
        line, ends = self.line, []
        for number, tokens in enumerate(lengths):
            question, again = divmod(number, line.samples)
            replica = self.samplers[question % len(self.samplers)]
            ends.append(replica.submit(0.0 if again else line.prompt, line.prompt, float(tokens)))
        return ends

    def _mark(self, step: int, first: int, size: int, places: list[Any]) -> Process:
        line, env = self.line, self.env
        if line.marker in ("nobody", "program"):
            yield self.sampled[step]
            with self._turn(line.marker == "program" and line.critics_share, step) as turn:
                yield turn
                spent = size * line.latency if line.marker == "program" else 0.0
                yield env.timeout(spent)
                self.marking += spent
        elif line.critics_share:
            yield self.sampled[step]
            with self._turn(True, step) as turn:
                yield turn
                yield env.all_of(self._asks(step, first, size))
        else:
            yield env.all_of(self._asks(step, first, size))
        for place in places:
            self.room.release(place)
        self.missing[step] -= size
        if not self.missing[step]:
            self.critiqued[step].succeed()

    def _asks(self, step: int, first: int, size: int) -> list[simpy.Event]:
        tokens = self.lengths[step][first : first + size]
        critiques = self.line.critique.draw(self.random, size) if self.line.critique else tokens
        return [
            self.env.process(self._ask(float(own), float(said)))
            for own, said in zip(tokens, critiques, strict=True)
        ]

    def _ask(self, answer: float, critique: float) -> Process:
        line = self.line
        with self.requests.request() as slot:
            yield slot
            if not self.critics:
                yield self.env.timeout(line.latency)
                self.marking += line.latency
                return
            self.asked += 1
            replica = self.critics[self.asked % len(self.critics)]
            read = line.critic_prompt + answer
            yield replica.submit(read, read, critique)

    def _learn_all(self) -> Process:
        line, env = self.line, self.env
        for step in range(self.count):
            yield self.sampled[step] & self.critiqued[step]
            critiqued = env.now
            with self._turn(line.samplers_share or line.critics_share, step) as turn:
                yield turn
                start, seconds = env.now, line.learn(self.lengths[step])
                yield env.timeout(seconds)
                self.learning += seconds
            yield env.timeout(line.publish)
            begun = self.steps[step]
            self.steps[step] = Step(begun.begun, begun.sampled, critiqued, start, env.now)
            self.learned[step].succeed()
