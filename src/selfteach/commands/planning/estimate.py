"""Forecast the step time of a layout, and search for the best layout of a number of devices."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from selfteach.commands.planning import costs
from selfteach.commands.planning.costs import DecodingCost, Efficiency, TrainingCost
from selfteach.commands.planning.devices import Device
from selfteach.commands.planning.layout import (
    Layout,
    RoleMemory,
    critic_groups,
    decoding_slots,
    memory_by_role,
    on_trainers,
    require_memory,
    sampler_groups,
    trainer_resident_bytes,
)
from selfteach.commands.planning.pipeline import Pipeline, Timeline
from selfteach.commands.planning.workload import StepWork
from selfteach.errors import RecipeError

MAX_STEPS, MAX_ROLLOUTS = 8, 2048
"""Steps that are simulated once the pipeline is full, and rollouts; at least two steps."""
NUM_CANDIDATES = 2
"""Layouts that are simulated: the fastest by estimate, and as many of the smallest among those whose
estimate is within `CANDIDATE_RATIO` of the fastest."""
CANDIDATE_RATIO = 1.05
MAX_NEEDED = 64
"""Where the search for enough devices ends."""
BOTTLENECK_SHARE = 0.9
"""A role that works at least this share of the time is the bottleneck."""
TIE_RATIO = 1.02
"""A layout on fewer devices is preferred if it is at most this much slower."""


@dataclass(frozen=True, slots=True)
class Hardware:
    """Describes the devices of a plan, and the share of their peak that is reached."""

    name: str
    device: Device
    efficiency: Efficiency


@dataclass(frozen=True, slots=True)
class Forecast:
    """Holds the predicted step time and memory of a layout."""

    work: StepWork
    hardware: Hardware
    layout: Layout
    pipeline: Pipeline
    training: TrainingCost
    timeline: Timeline
    memory: tuple[RoleMemory, ...]

    @property
    def period(self) -> float:
        """Return the seconds from one step to the next."""
        return self.timeline.period

    @property
    def bottleneck(self) -> str:
        """Return what limits the step time."""
        active = self.timeline.active
        role = max(active, key=lambda name: active[name])
        if active[role] >= BOTTLENECK_SHARE:
            return role
        if self.work.staleness == 0 or _all_phases_share(self.pipeline):
            longest = max(self.phases, key=lambda phase: self.phases[phase])
            return f"the sum of the phases, mostly {longest}"
        return f"the latency of one step through all phases, at staleness {self.work.staleness}"

    @property
    def phases(self) -> dict[str, float]:
        """Return the mean seconds of a step per phase, without waiting for a turn to train."""
        times = self.timeline
        return {
            "rollout": times.mean("started", "sampled"),
            "critique": max(0.0, times.mean("sampled", "critiqued")),
            "train": times.mean("train_started", "trained"),
        }

    @property
    def tokens(self) -> dict[str, float]:
        """Return the mean tokens of a step per phase: sampled, written by the critic, trained on."""
        work, mean_R = self.work, np.array([self.work.rollout_lengths.mean])
        critiques = work.critic.critique_lengths
        per_rollout = {
            "rollout": work.rollout_lengths.mean,
            "critique": critiques.mean if critiques else 0.0,
            "train": float(costs.micro_batch_tokens(work, mean_R)[0]) * work.updates,
        }
        shares = {"rollout": work.sampled_share, "critique": 1.0, "train": work.trained_share}
        return {
            phase: work.rollouts * shares[phase] * tokens for phase, tokens in per_rollout.items()
        }


def forecast(work: StepWork, hardware: Hardware, layout: Layout) -> Forecast:
    """Simulate a layout. Raises `RecipeError` where its memory is too small, or without SimPy."""
    require_memory(work, hardware.device, layout, hardware.name)
    work = on_trainers(work, hardware.device, layout)
    pipeline = pipeline_of(work, hardware, layout)
    steps = max(2, min(MAX_STEPS, MAX_ROLLOUTS // work.rollouts))
    timeline = load_simulate()(pipeline, steps=steps)
    training = costs.training_cost(work, hardware.device, hardware.efficiency, layout.trainers)
    memory = tuple(memory_by_role(work, hardware.device, layout))
    return Forecast(work, hardware, layout, pipeline, training, timeline, memory)


def load_simulate() -> Callable[..., Timeline]:
    """Import `simulate`. Raises `RecipeError` without SimPy, which only plans need."""
    try:
        from selfteach.commands.planning.simulation import simulate
    except ModuleNotFoundError as error:
        if error.name != "simpy":
            raise
        raise RecipeError('selfteach plan needs SimPy: pip install "selfteach[plan]"') from None
    return simulate


def pipeline_of(work: StepWork, hardware: Hardware, layout: Layout) -> Pipeline:
    """Return the pipeline of a layout."""
    device, efficiency, critic = hardware.device, hardware.efficiency, work.critic
    per_batch = max(1, work.batch_size // work.group_size) * work.group_size
    starts = range(0, work.rollouts, per_batch)
    separate_samplers = layout.samplers > 0
    weight_sync = costs.weight_sync_seconds(work, device, efficiency, layout.devices)
    return Pipeline(
        batches=[min(per_batch, work.rollouts - start) for start in starts],
        group_size=work.group_size,
        prompt=work.prompt,
        shared_prompt=work.shared.prefix,
        rollout_lengths=work.rollout_lengths,
        sampler=_sampler_cost(work, hardware, layout),
        samplers=min(layout.sampler_replicas, work.problems),
        train_seconds=costs.training_cost(work, device, efficiency, layout.trainers).seconds,
        weight_sync=weight_sync if separate_samplers else 0.0,
        sleep_and_wake=_wake_seconds(work, hardware, layout),
        staleness=work.staleness,
        sampling_shares_devices=not separate_samplers,
        critic_kind=critic.kind,
        critic=_critic_cost(work, hardware, layout),
        critics=layout.critic_replicas if critic.kind == "served" else 1,
        critic_shares_devices=_critic_shares_devices(work, layout),
        critic_prompt=critic.prompt,
        critique_lengths=critic.critique_lengths,
        latency=efficiency.critique_s if critic.kind == "program" else critic.latency,
        concurrency=critic.concurrency,
        queue=max(per_batch, 2 * critic.concurrency),
        rounds=work.rounds,
        mixed_share=work.mixed_share,
    )


def best_forecast(work: StepWork, hardware: Hardware, total: int) -> Forecast:
    """Return the fastest layout of at most ``total`` devices; among equals, that with the fewest.

    Raises `RecipeError` where no layout holds the work.
    """
    lengths_R = work.rollout_lengths.sample(np.random.default_rng(0), work.rollouts)
    estimates = [
        (estimate(work, hardware, layout, lengths_R), layout.devices, layout)
        for layout in layouts(work, hardware.device, total)
        if _fits(work, hardware, layout)
    ]
    # A served critic shares devices only if something puts it to sleep: the last resort.
    separate = [row for row in estimates if row[2].critics] if work.critic.kind == "served" else []
    estimates = separate or estimates
    if not estimates:
        raise RecipeError(f"--devices {total}: {_devices_needed(work, hardware, total)}")
    estimates.sort(key=lambda row: row[:2])
    near = [row for row in estimates if row[0] <= CANDIDATE_RATIO * estimates[0][0]]
    smallest = sorted(near, key=lambda row: row[1])
    candidates = (*estimates[:NUM_CANDIDATES], *smallest[:NUM_CANDIDATES])
    simulated = [
        forecast(work, hardware, layout)
        for layout in dict.fromkeys(layout for _, _, layout in candidates)
    ]
    fastest = min(one.period for one in simulated)
    ties = [one for one in simulated if one.period <= TIE_RATIO * fastest]
    return min(ties, key=lambda one: (one.layout.devices, one.period))


def _fits(work: StepWork, hardware: Hardware, layout: Layout) -> bool:
    try:
        require_memory(work, hardware.device, layout, hardware.name)
    except RecipeError:
        return False
    return True


def _devices_needed(work: StepWork, hardware: Hardware, total: int) -> str:
    """Describe how many devices would hold the work."""
    for count in range(total + 1, MAX_NEEDED + 1):
        candidates = layouts(work, hardware.device, count)
        if any(_fits(work, hardware, layout) for layout in candidates):
            return f"too few to hold this; at least {count} × {hardware.name} are needed"
    return f"{MAX_NEEDED} × {hardware.name} do not hold this either; plan --trainers explains why"


def layouts(work: StepWork, device: Device, total: int) -> Iterator[Layout]:
    """Yield candidates: counts per role in steps of about half, on at most ``total`` devices."""
    served = work.critic.kind == "served"
    for critic_group in critic_groups(work, device):
        for critics in (0, *_counts(total, critic_group)) if served else (0,):
            left = total - critics
            for trainers in _counts(min(left, work.rollouts), 1):
                if served and not critics and critic_group > trainers:
                    continue
                for group in sampler_groups(work, device) or [1]:
                    if group <= trainers:
                        yield Layout(trainers, 0, critics, group, critic_group)
                    samplers = min(left - trainers, work.problems * group) // group * group
                    if samplers:
                        yield Layout(trainers, samplers, critics, group, critic_group)


def estimate(work: StepWork, hardware: Hardware, layout: Layout, lengths_R: np.ndarray) -> float:
    """Return the seconds of a step without a simulation: each phase alone, then roles overlapped.

    Accurate to a factor of two: lengths are sampled once, and no two steps share an engine.
    """
    work = on_trainers(work, hardware.device, layout)
    pipeline, critic = pipeline_of(work, hardware, layout), work.critic
    per_replica = -(-work.rollouts // pipeline.samplers)
    sampling = pipeline.sampler.decode_seconds(lengths_R[:per_replica], work.prompt)
    problems = -(-work.problems // pipeline.samplers)
    prefill = costs.prefill_tokens(work, problems, work.batches)
    sampling += prefill * pipeline.sampler.prefill
    concurrency = pipeline.concurrency if critic.kind == "latency" else 1
    critiquing = work.rollouts * pipeline.latency / concurrency
    if pipeline.critic is not None and critic.critique_lengths is not None:
        sampled_R = critic.critique_lengths.sample(np.random.default_rng(1), work.rollouts)
        lengths = sampled_R[: -(-work.rollouts // pipeline.critics)]
        context = critic.prompt + work.rollout_lengths.mean
        critiquing = pipeline.critic.decode_seconds(lengths, context)
        critiquing += len(lengths) * context * pipeline.critic.prefill
    trained_R = lengths_R[: max(1, round(len(lengths_R) * work.trained_share))]
    training = pipeline.train_seconds(trained_R) + pipeline.weight_sync
    sampling *= work.sampled_share  # at least: a smaller round has the same longest rollout
    if pipeline.sampling_shares_devices:
        shared = sampling + pipeline.sleep_and_wake + training
        in_turns = pipeline.critic_shares_devices
        roles = (shared + critiquing, 0.0) if in_turns else (shared, critiquing)
    else:
        roles = (sampling, critiquing, training)
    latency = sampling + pipeline.sleep_and_wake + critiquing + training
    return max(*roles, latency / (1 + work.staleness))


def _counts(most: int, unit: int) -> list[int]:
    """Return multiples of ``unit``: powers of two, the midpoints between them, and ``most``."""
    counts = {most // unit}
    size = 1
    while size * unit <= most:
        counts |= {size, size * 3 // 2}
        size *= 2
    return sorted(count * unit for count in counts if 0 < count * unit <= most)


def _critic_shares_devices(work: StepWork, layout: Layout) -> bool:
    return not layout.critics and work.critic.kind in ("in_process", "served", "program")


def _wake_seconds(work: StepWork, hardware: Hardware, layout: Layout) -> float:
    """Return the seconds per step of engines that share devices: sleep and wake-up."""
    device, efficiency, critic = hardware.device, hardware.efficiency, work.critic
    seconds = 0.0
    if work.engine == "vllm" and not layout.samplers:
        seconds += costs.wake_seconds(work.load.shape, device, efficiency, layout.sampler_group)
    shares_devices = _critic_shares_devices(work, layout)
    if critic.kind == "served" and shares_devices and critic.shape is not None:
        seconds += costs.wake_seconds(critic.shape, device, efficiency, layout.critic_group)
    return seconds


def _sampler_cost(work: StepWork, hardware: Hardware, layout: Layout) -> DecodingCost:
    shape, group = work.load.shape, layout.sampler_group
    engine = "vllm" if layout.samplers else work.engine
    if engine == "vllm":
        resident = 0 if layout.samplers else trainer_resident_bytes(work, layout)
        length = work.prompt + work.rollout_lengths.mean
        slots = max(1, decoding_slots(shape, hardware.device, group, length, resident))
    else:  # every rollout of a batch has a row
        group, slots = 1, work.batch_size
    return costs.decoding_cost(
        shape, hardware.device, hardware.efficiency, group=group, slots=slots, engine=engine
    )


def _critic_cost(work: StepWork, hardware: Hardware, layout: Layout) -> DecodingCost | None:
    critic, device, efficiency = work.critic, hardware.device, hardware.efficiency
    if critic.shape is None or critic.critique_lengths is None:
        return None
    if critic.kind == "in_process":
        return costs.decoding_cost(
            critic.shape, device, efficiency, group=1, slots=critic.concurrency,
            engine="transformers",
        )  # fmt: skip
    group = layout.critic_group
    length = critic.prompt + work.rollout_lengths.mean + critic.critique_lengths.mean
    resident = 0 if layout.critics else trainer_resident_bytes(work, layout)
    slots = max(1, decoding_slots(critic.shape, device, group, length, resident))
    return costs.decoding_cost(
        critic.shape, device, efficiency, group=group, slots=slots, engine="vllm"
    )


def _all_phases_share(pipeline: Pipeline) -> bool:
    return pipeline.sampling_shares_devices and (
        pipeline.critic_shares_devices or pipeline.critic_kind == "none"
    )


def with_full_concurrency(work: StepWork) -> StepWork:
    """Return the same work with a critic request for every rollout that can be in flight."""
    critic = work.critic
    if critic.kind not in ("served", "latency"):
        return work
    concurrency = max(critic.concurrency, work.rollouts * (1 + work.staleness))
    return dataclasses.replace(work, critic=dataclasses.replace(critic, concurrency=concurrency))
