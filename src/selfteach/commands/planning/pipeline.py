"""Describe the concurrent pipeline of samplers, critics and trainers, and the timeline of its steps.

Step t is sampled batch by batch; a batch's rollouts go to the critic once the whole batch is sampled,
and the step is trained on once all its rollouts are critiqued. The weights that sample step t have
seen at least t − s updates (s is the staleness limit): with s = 0 each step waits for the one before.
Roles that share devices take turns, the older step first. Times are in seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from selfteach.commands.planning.costs import DecodingCost
from selfteach.commands.planning.lengths import LengthDistribution
from selfteach.commands.planning.workload import CriticKind


@dataclass(frozen=True, slots=True)
class Pipeline:
    """Describes who does what, and how fast."""

    batches: Sequence[int]
    """Rollouts in each sampling batch of a step."""
    group_size: int
    """Rollouts of one problem: their prompt is prefilled once."""
    prompt: float
    rollout_lengths: LengthDistribution
    sampler: DecodingCost
    samplers: int
    """Replicas."""
    train_seconds: Callable[[np.ndarray], float]
    """Seconds of a step from the lengths of its rollouts."""
    weight_sync: float = 0.0
    """Seconds until samplers have new weights."""
    sleep_and_wake: float = 0.0
    """Seconds of an engine's sleep and wake-up, once a step."""
    staleness: int = 0
    sampling_shares_devices: bool = False
    """Sampling and training take turns on the same devices."""
    critic_kind: CriticKind = "none"
    critic: DecodingCost | None = None
    critics: int = 1
    """Replicas."""
    critic_shares_devices: bool = False
    """Critiquing and training take turns on the same devices."""
    critic_prompt: float = 0.0
    critique_lengths: LengthDistribution | None = None
    shared_prompt: float = 0.0
    """Tokens with which all prompts begin: a sampler computes them once per batch."""
    latency: float = 0.0
    """Seconds per reply (``latency``) or per rollout (``program``)."""
    concurrency: int = 1
    """Requests in flight at most."""
    queue: int = 256
    """Rollouts that may wait for the critic; a full queue blocks sampling."""
    rounds: int = 0
    """Most further rounds of a step (dynamic sampling)."""
    mixed_share: float = 1.0
    """Share of groups with both right and wrong rollouts, which alone are trained on in rounds."""


@dataclass(frozen=True, slots=True)
class SampledStep:
    """Holds what a step samples, round after round."""

    batches: tuple[int, ...]
    """Rollouts in each sampling batch, those of the first round first."""
    trained_R: np.ndarray
    """True for each rollout that is trained on."""

    @classmethod
    def draw(cls, pipeline: Pipeline, rng: np.random.Generator) -> SampledStep:
        """Draw which groups are mixed, and with that how many further rounds there are."""
        groups = sum(pipeline.batches) // pipeline.group_size
        if not pipeline.rounds:
            return cls(tuple(pipeline.batches), np.ones(sum(pipeline.batches), dtype=bool))
        most = max(pipeline.batches)
        batches, mixed = list(pipeline.batches), list(rng.random(groups) < pipeline.mixed_share)
        for _ in range(pipeline.rounds):
            missing = groups - sum(mixed)
            if missing <= 0:
                break
            rollouts = missing * pipeline.group_size
            batches += [min(most, rollouts - start) for start in range(0, rollouts, most)]
            mixed += list(rng.random(missing) < pipeline.mixed_share)
        return cls(tuple(batches), np.repeat(np.array(mixed, dtype=bool), pipeline.group_size))


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Holds when the phases of a step started and ended, in seconds since the start."""

    started: float
    sampled: float
    critiqued: float
    train_started: float
    trained: float
    """The samplers have the new weights."""


@dataclass(frozen=True, slots=True)
class Timeline:
    """Holds the result of a simulation."""

    steps: tuple[StepTimes, ...]
    period: float
    """Seconds from one step to the next, once the pipeline is full."""
    active: dict[str, float]
    """Share of that time in which samplers, critics and trainers work, from 0 to 1."""

    def mean(self, start: str, end: str) -> float:
        """Return the mean seconds between two times of a step, fields of `StepTimes`."""
        spans = [getattr(step, end) - getattr(step, start) for step in self.steps]
        return sum(spans) / len(spans)
