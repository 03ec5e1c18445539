"""A layout's step time, and the best layout of so many devices."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from selfteach.errors import RecipeError
from selfteach.planning import costs
from selfteach.planning.costs import Decoding, Efficiency, Learning
from selfteach.planning.devices import Device
from selfteach.planning.layout import (
    Held,
    Layout,
    critic_groups,
    held_by,
    require_room,
    resting,
    sampler_groups,
    slots_of,
)
from selfteach.planning.simulation import Line, Timeline, simulate
from selfteach.planning.workload import Work

STEPS, EVENTS = 8, 2048
"""Steps that are simulated once the pipeline is full, and answers; at least two steps."""
TRIED = 2
"""Layouts that are simulated: so many by the estimate of their speed, and as many of the smallest
among those that are estimated to be within `NEAR` of the fastest."""
NEAR = 1.05
MOST_NEEDED = 64
"""Where the search for enough devices ends."""
BOUND = 0.9
"""Share of the time from which on a part that works is what the others wait for."""
WITHIN = 1.02
"""A layout on fewer devices is preferred if it is at most so much slower."""


@dataclass(frozen=True, slots=True)
class Where:
    """Which devices, and how much of them is had."""

    name: str
    device: Device
    have: Efficiency


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a layout would come to."""

    work: Work
    where: Where
    layout: Layout
    line: Line
    learning: Learning
    timeline: Timeline
    held: tuple[Held, ...]

    @property
    def period(self) -> float:
        """Seconds from one step to the next."""
        return self.timeline.period

    @property
    def bottleneck(self) -> str:
        """What the others wait for."""
        busy = self.timeline.busy
        name = max(busy, key=lambda part: busy[part])
        if busy[name] >= BOUND:
            return name
        if self.work.staleness == 0 or _shared(self.layout, self.line):
            longest = max(self.phases, key=lambda phase: self.phases[phase])
            return f"the sum of the phases, {longest} most of all"
        return f"the way of one step through all phases, at staleness {self.work.staleness}"

    @property
    def phases(self) -> dict[str, float]:
        """Mean seconds of a step in each phase, waiting for its turn left out where it is known."""
        time = self.timeline
        return {
            "rollout": time.mean("begun", "sampled"),
            "critique": max(0.0, time.mean("sampled", "critiqued")),
            "train": time.mean("learning", "learned"),
        }

    @property
    def tokens(self) -> dict[str, float]:
        """Mean tokens of a step: sampled, written by the critic, and passed through the trainers."""
        work, one = self.work, np.array([self.work.answer.mean])
        critiqued = work.asked.critique.mean if work.asked.critique else 0.0
        learned = float(costs.micro_tokens(work, one)[0]) * work.updates
        each = (work.answer.mean, critiqued, learned)
        names = ("rollout", "critique", "train")
        return {name: work.answers * own for name, own in zip(names, each, strict=True)}


def forecast(work: Work, where: Where, layout: Layout) -> Forecast:
    """Simulate a layout. Raises `RecipeError` where it cannot hold the work."""
    require_room(work, where.device, layout, where.name)
    line, learning = line_of(work, where, layout)
    steps = max(2, min(STEPS, EVENTS // work.answers))
    return Forecast(
        work, where, layout, line, learning, simulate(line, steps=steps),
        tuple(held_by(work, where.device, layout)),
    )  # fmt: skip


def _holds(work: Work, where: Where, layout: Layout) -> bool:
    try:
        require_room(work, where.device, layout, where.name)
    except RecipeError:
        return False
    return True


def _needed(work: Work, where: Where, total: int) -> str:
    """How many devices would do."""
    for more in range(total + 1, MOST_NEEDED + 1):
        if any(_holds(work, where, layout) for layout in layouts(work, where.device, more)):
            return f"too few to hold this; at least {more} × {where.name} are needed"
    return f"{MOST_NEEDED} × {where.name} do not hold this either; plan --trainers says why"


def line_of(work: Work, where: Where, layout: Layout) -> tuple[Line, Learning]:
    """The pipeline of a layout, with what its trainers take."""
    device, have, asked = where.device, where.have, work.asked
    learning = costs.learning(work, device, have, layout.trainers)
    per_batch = max(1, work.batch_size // work.samples) * work.samples
    sizes = [min(per_batch, work.answers - start) for start in range(0, work.answers, per_batch)]
    alone = layout.samplers > 0
    engine = "vllm" if alone else work.engine
    wakes = 0.0
    if engine == "vllm" and not alone:
        wakes += costs.wake_seconds(work.load.shape, device, have, layout.sampler_group)
    shares = not layout.critics and asked.marker in ("own", "served", "program")
    if asked.marker == "served" and shares and asked.shape is not None:
        wakes += costs.wake_seconds(asked.shape, device, have, layout.critic_group)
    critic = _critic(work, where, layout)
    line = Line(
        batches=sizes,
        samples=work.samples,
        prompt=work.prompt,
        answer=work.answer,
        sampler=_sampler(work, where, layout, engine),
        samplers=min(layout.sampler_replicas, work.problems),
        learn=learning.seconds,
        publish=costs.publish_seconds(work, device, have, layout.devices) if alone else 0.0,
        wake=wakes,
        staleness=work.staleness,
        samplers_share=not alone,
        marker=asked.marker,
        critic=critic,
        critics=layout.critic_replicas if asked.marker == "served" else 1,
        critics_share=shares,
        critic_prompt=asked.prompt,
        critique=asked.critique,
        latency=have.mark_s if asked.marker == "program" else asked.latency,
        concurrency=asked.concurrency,
        queue=max(per_batch, 2 * asked.concurrency),
    )
    return line, learning


def best(work: Work, where: Where, total: int) -> Forecast:
    """The fastest layout of at most so many devices; of those as fast, the one with the fewest.

    Raises `RecipeError` where none holds the work.
    """
    drawn = work.answer.draw(np.random.default_rng(0), work.answers)
    told = [
        (estimate(work, where, layout, drawn), layout.devices, layout)
        for layout in layouts(work, where.device, total)
        if _holds(work, where, layout)
    ]
    # A served critic gives way to nobody unless somebody puts it to sleep: only where it must.
    apart = [row for row in told if row[2].critics] if work.asked.marker == "served" else []
    told = apart or told
    if not told:
        raise RecipeError(f"--devices {total}: {_needed(work, where, total)}")
    told.sort(key=lambda row: row[:2])
    small = sorted((row for row in told if row[0] <= NEAR * told[0][0]), key=lambda row: row[1])
    tried = dict.fromkeys(layout for _, _, layout in (*told[:TRIED], *small[:TRIED]))
    simulated = [forecast(work, where, layout) for layout in tried]
    fastest = min(one.period for one in simulated)
    near = [one for one in simulated if one.period <= WITHIN * fastest]
    return min(near, key=lambda one: (one.layout.devices, one.period))


def layouts(work: Work, device: Device, total: int) -> Iterator[Layout]:
    """Candidates: trainers, samplers and critics in steps of about half, on at most ``total``."""
    served = work.asked.marker == "served"
    for critic_group in critic_groups(work, device):
        for critics in (0, *_counts(total, critic_group)) if served else (0,):
            left = total - critics
            for trainers in _counts(min(left, work.answers), 1):
                if served and not critics and critic_group > trainers:
                    continue
                for group in sampler_groups(work, device) or [1]:
                    if group <= trainers:
                        yield Layout(trainers, 0, critics, group, critic_group)
                    samplers = min(left - trainers, work.problems * group) // group * group
                    if samplers:
                        yield Layout(trainers, samplers, critics, group, critic_group)


def estimate(work: Work, where: Where, layout: Layout, answers_A: np.ndarray) -> float:
    """Seconds of a step without a simulation: each phase by itself, the parts then overlapped.

    Good to a factor of two: it draws lengths once, and takes each step to have its engines alone.
    """
    line, learning = line_of(work, where, layout)
    replicas, asked = line.samplers, work.asked
    share = -(-work.answers // replicas)
    prompts = -(-work.problems // replicas) * work.prompt * line.sampler.prefill
    sampling = line.sampler.drain(answers_A[:share], work.prompt) + prompts
    marking = work.answers * line.latency / (line.concurrency if asked.marker == "latency" else 1)
    if line.critic is not None and asked.critique is not None:
        drawn = asked.critique.draw(np.random.default_rng(1), work.answers)
        context = asked.prompt + work.answer.mean
        own = drawn[: -(-work.answers // line.critics)]
        marking = line.critic.drain(own, context) + len(own) * context * line.critic.prefill
    learned = learning.seconds(answers_A) + line.publish
    if line.samplers_share:
        together = sampling + line.wake + learned + (marking if line.critics_share else 0.0)
        parts = (together, 0.0 if line.critics_share else marking)
    else:
        parts = (sampling, marking, learned)
    way = sampling + line.wake + marking + learned
    return max(*parts, way / (1 + work.staleness))


def _counts(most: int, unit: int) -> list[int]:
    """Multiples of ``unit`` up to ``most``: powers of two and the halves between, and ``most``."""
    found = {most // unit}
    size = 1
    while size * unit <= most:
        found |= {size, size * 3 // 2}
        size *= 2
    return sorted(count * unit for count in found if 0 < count * unit <= most)


def _sampler(work: Work, where: Where, layout: Layout, engine: str) -> Decoding:
    shape, group = work.load.shape, layout.sampler_group
    if engine != "vllm":  # every answer of a batch has a row
        return costs.decoding(
            shape, where.device, where.have, group=1, slots=work.batch_size, engine=engine
        )
    kept = 0 if layout.samplers else resting(work, layout)
    slots = slots_of(shape, where.device, group, work.prompt + work.answer.mean, kept)
    return costs.decoding(
        shape, where.device, where.have, group=group, slots=max(1, slots), engine=engine
    )


def _critic(work: Work, where: Where, layout: Layout) -> Decoding | None:
    asked, device, have = work.asked, where.device, where.have
    if asked.shape is None or asked.critique is None:
        return None
    if asked.marker == "own":
        return costs.decoding(
            asked.shape, device, have, group=1, slots=asked.concurrency, engine="transformers"
        )
    length = asked.prompt + work.answer.mean + asked.critique.mean
    kept = 0 if layout.critics else resting(work, layout)
    slots = slots_of(asked.shape, device, layout.critic_group, length, kept)
    return costs.decoding(
        asked.shape, device, have, group=layout.critic_group, slots=max(1, slots), engine="vllm"
    )


def _shared(layout: Layout, line: Line) -> bool:
    return line.samplers_share and (line.critics_share or line.marker == "nobody")


def with_concurrency(work: Work) -> Work:
    """The same work with requests to the critic for all answers that can be on their way at a time."""
    if work.asked.marker not in ("served", "latency"):
        return work
    wide = max(work.asked.concurrency, work.answers * (1 + work.staleness))
    return dataclasses.replace(work, asked=dataclasses.replace(work.asked, concurrency=wide))
