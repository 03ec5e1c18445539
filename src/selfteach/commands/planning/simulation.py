"""Simulate a `Pipeline` event by event, with SimPy (the extra ``plan``)."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import simpy

from selfteach.commands.planning.costs import DecodingCost
from selfteach.commands.planning.pipeline import Pipeline, SampledStep, StepTimes, Timeline

Process = Generator[simpy.Event, Any, None]


def simulate(pipeline: Pipeline, *, steps: int = 8, seed: int = 0) -> Timeline:
    """Simulate ``steps`` steps with lengths sampled by ``seed``.

    Further steps before and after them keep the pipeline full from the first to the last.
    """
    warm_up = 1 + pipeline.staleness
    simulation = _Simulation(pipeline, warm_up + steps + warm_up, np.random.default_rng(seed))
    start = simulation.run(until=warm_up)
    active_before = dict(simulation.active_seconds())
    end = simulation.run(until=warm_up + steps)
    seconds = max(end - start, 1e-12)
    active = {
        role: (total - active_before[role]) / seconds
        for role, total in simulation.active_seconds().items()
    }
    measured = simulation.steps[warm_up : warm_up + steps]
    return Timeline(tuple(measured), seconds / steps, active)


class _Replica:
    """Simulates an engine: requests join and leave between passes, and share its time meanwhile."""

    def __init__(self, env: simpy.Environment, cost: DecodingCost) -> None:
        self._env, self._cost = env, cost
        self._waiting: deque[tuple[float, float, float, simpy.Event]] = deque()
        self._running: list[tuple[float, int, float, simpy.Event]] = []
        """A heap of (pass at which it ends, number, context at its end, event)."""
        self._passes, self._context, self._number = 0.0, 0.0, 0
        self._arrival = env.event()
        self.active_seconds = 0.0
        env.process(self._run())

    def submit(self, prefill: float, context: float, tokens: float) -> simpy.Event:
        """Request ``tokens`` tokens after ``context`` of which ``prefill`` are not in the cache."""
        done = self._env.event()
        self._waiting.append((prefill, context, tokens, done))
        if not self._arrival.triggered:
            self._arrival.succeed()
        return done

    def _run(self) -> Process:
        while True:
            prefill_seconds = self._admit()
            if not self._running:
                self._arrival = self._env.event()
                yield self._arrival
                continue
            if prefill_seconds:
                self.active_seconds += prefill_seconds
                yield self._env.timeout(prefill_seconds)
            yield from self._decode()

    def _admit(self) -> float:
        """Admit requests to free slots; return the seconds to prefill them."""
        seconds = 0.0
        while self._waiting and len(self._running) < self._cost.slots:
            prefill, context, tokens, done = self._waiting.popleft()
            seconds += prefill * self._cost.prefill
            self._context += context
            self._number += 1
            end = self._passes + tokens
            heapq.heappush(self._running, (end, self._number, context + tokens, done))
        return seconds

    def _decode(self) -> Process:
        """Decode until the next request ends, or another arrives for a free slot."""
        rows, ahead = len(self._running), max(0.0, self._running[0][0] - self._passes)
        per_pass = self._cost.pass_seconds(rows, self._context + rows * ahead / 2)
        start = self._env.now
        due = self._env.timeout(ahead * per_pass)
        if rows < self._cost.slots:
            if not self._waiting:
                self._arrival = self._env.event()
            yield due | self._arrival
        else:
            yield due
        elapsed = self._env.now - start
        self.active_seconds += elapsed
        passes = ahead if due.processed else min(ahead, elapsed / per_pass)
        self._passes += passes
        self._context += rows * passes
        while self._running and self._running[0][0] <= self._passes + 1e-9:
            _, _, context, done = heapq.heappop(self._running)
            self._context -= context
            done.succeed()


@dataclass
class _Simulation:
    """Holds the state of a simulation."""

    pipeline: Pipeline
    count: int
    rng: np.random.Generator
    steps: list[StepTimes] = field(default_factory=list)

    def __post_init__(self) -> None:
        pipeline = self.pipeline
        self.env = env = simpy.Environment(0.0)
        self.device = simpy.PriorityResource(env)
        self.requests = simpy.Resource(env, max(1, pipeline.concurrency))
        self.queue = simpy.Resource(env, max(1, pipeline.queue))
        self.samplers = [_Replica(env, pipeline.sampler) for _ in range(pipeline.samplers)]
        critic, replicas = pipeline.critic, pipeline.critics
        self.critics = [_Replica(env, critic) for _ in range(replicas)] if critic else []
        self.sampled = [env.event() for _ in range(self.count)]
        self.critiqued = [env.event() for _ in range(self.count)]
        self.trained = [env.event() for _ in range(self.count)]
        self.work = [SampledStep.draw(pipeline, self.rng) for _ in range(self.count)]
        self.not_critiqued = [len(step.trained_R) for step in self.work]
        self.lengths = [
            pipeline.rollout_lengths.sample(self.rng, len(step.trained_R)) for step in self.work
        ]
        self.num_requests, self.training_seconds, self.critique_seconds = 0, 0.0, 0.0
        env.process(self._sample_steps())
        env.process(self._train_steps())

    def run(self, until: int) -> float:
        """Run until ``until`` steps are trained on; return the time."""
        self.env.run(until=self.trained[until - 1])
        return self.env.now

    def active_seconds(self) -> dict[str, float]:
        """Return the seconds that each role has worked so far, averaged over its replicas."""
        samplers = sum(replica.active_seconds for replica in self.samplers) / len(self.samplers)
        critics = self.critique_seconds / max(1, self.pipeline.concurrency)
        if self.critics:
            critics = sum(replica.active_seconds for replica in self.critics) / len(self.critics)
        elif self.pipeline.critic_kind == "program":
            critics = self.critique_seconds
        return {"samplers": samplers, "critics": critics, "trainers": self.training_seconds}

    @contextmanager
    def _turn(self, shares_devices: bool, step: int) -> Any:
        """Yield the event of a turn on the shared devices; an immediate one where none is needed."""
        if not shares_devices:
            yield self.env.timeout(0)
            return
        with self.device.request(priority=step) as turn:
            yield turn

    def _sample_steps(self) -> Process:
        pipeline, env = self.pipeline, self.env
        for step in range(self.count):
            if step > pipeline.staleness:
                yield self.trained[step - pipeline.staleness - 1]
            first, started = 0, env.now
            for number, size in enumerate(self.work[step].batches):
                with self._turn(pipeline.sampling_shares_devices, step) as turn:
                    yield turn
                    if number == 0:
                        started = env.now
                        yield env.timeout(pipeline.sleep_and_wake)
                    yield env.all_of(self._generate(self.lengths[step][first : first + size]))
                # A program, and a critic that takes turns, starts once the whole step is sampled.
                queued = (
                    pipeline.critic_kind in ("served", "latency")
                    and not pipeline.critic_shares_devices
                )
                places = [self.queue.request() for _ in range(size if queued else 0)]
                yield env.all_of(places)
                env.process(self._critique(step, first, size, places))
                first += size
            self.steps.append(StepTimes(started, env.now, 0.0, 0.0, 0.0))
            self.sampled[step].succeed()

    def _generate(self, lengths: np.ndarray) -> list[simpy.Event]:
        """Submit a batch of whole groups of rollouts, dealt to the samplers in turn."""
        pipeline, ends = self.pipeline, []
        for number, tokens in enumerate(lengths):
            problem, sample = divmod(number, pipeline.group_size)
            replica = self.samplers[problem % len(self.samplers)]
            cached = pipeline.shared_prompt if problem >= len(self.samplers) else 0.0
            prefill = 0.0 if sample else pipeline.prompt - cached
            ends.append(replica.submit(prefill, pipeline.prompt, float(tokens)))
        return ends

    def _critique(self, step: int, first: int, size: int, places: list[Any]) -> Process:
        pipeline, env = self.pipeline, self.env
        if pipeline.critic_kind in ("none", "program"):
            is_program = pipeline.critic_kind == "program"
            yield self.sampled[step]
            with self._turn(is_program and pipeline.critic_shares_devices, step) as turn:
                yield turn
                seconds = size * pipeline.latency if is_program else 0.0
                yield env.timeout(seconds)
                self.critique_seconds += seconds
        elif pipeline.critic_shares_devices:
            yield self.sampled[step]
            with self._turn(True, step) as turn:
                yield turn
                yield env.all_of(self._critic_requests(step, first, size))
        else:
            yield env.all_of(self._critic_requests(step, first, size))
        for place in places:
            self.queue.release(place)
        self.not_critiqued[step] -= size
        if not self.not_critiqued[step]:
            self.critiqued[step].succeed()

    def _critic_requests(self, step: int, first: int, size: int) -> list[simpy.Event]:
        rollouts = self.lengths[step][first : first + size]
        distribution = self.pipeline.critique_lengths
        critiques = distribution.sample(self.rng, size) if distribution else rollouts
        return [
            self.env.process(self._critic_request(float(rollout), float(critique)))
            for rollout, critique in zip(rollouts, critiques, strict=True)
        ]

    def _critic_request(self, rollout: float, critique: float) -> Process:
        pipeline = self.pipeline
        with self.requests.request() as slot:
            yield slot
            if not self.critics:
                yield self.env.timeout(pipeline.latency)
                self.critique_seconds += pipeline.latency
                return
            self.num_requests += 1
            replica = self.critics[self.num_requests % len(self.critics)]
            context = pipeline.critic_prompt + rollout
            yield replica.submit(context, context, critique)

    def _train_steps(self) -> Process:
        pipeline, env = self.pipeline, self.env
        shares_devices = pipeline.sampling_shares_devices or pipeline.critic_shares_devices
        for step in range(self.count):
            yield self.sampled[step] & self.critiqued[step]
            critiqued = env.now
            with self._turn(shares_devices, step) as turn:
                yield turn
                start = env.now
                trained_R = self.lengths[step][self.work[step].trained_R]
                seconds = pipeline.train_seconds(trained_R) if len(trained_R) else 0.0
                yield env.timeout(seconds)
                self.training_seconds += seconds
            yield env.timeout(pipeline.weight_sync)
            times = self.steps[step]
            self.steps[step] = StepTimes(times.started, times.sampled, critiqued, start, env.now)
            self.trained[step].succeed()
