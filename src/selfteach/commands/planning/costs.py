"""Compute how long one device, or a group of them, takes for a step: roofline arithmetic.

Operations count a multiplication and an addition as two. A token costs 2 operations per weight that it
meets in the forward pass, and attention to its past 2 A L per layer (A the width of all heads, L the
length of the sequence; under causal attention a token sees half of it). The backward pass costs as
much again for the inputs' gradients, and as much again for the weights' where they train. Only rollout
tokens meet the head. Generation is bound differently: each pass writes one token per rollout and has to
read all weights, and the keys and values of all rollouts, from memory (Pope et al., arXiv:2211.05102).

Shape suffixes: R rollouts, T trainers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from selfteach.commands.planning.dealt_rollouts import (
    DealtRollouts,
    TokensShared,
    deal,
    tokens_shared,
)
from selfteach.commands.planning.devices import Device
from selfteach.commands.planning.workload import StepWork
from selfteach.models.architectures import Shape
from selfteach.trainer.device_memory import FLOAT

SERVED_BYTES = 2
"""Bytes per weight, key or value in an engine: bfloat16."""
OPTIMIZER_BANDWIDTH_SHARE = 0.6
"""Share of the memory bandwidth that AdamW reaches: assumed, and too short to be measured."""
ADAMW_NUMBERS_MOVED = 7
"""Numbers that AdamW reads or writes per trained number: weight, gradient and two moments are read;
all but the gradient are written."""


@dataclass(frozen=True, slots=True)
class Efficiency:
    """Holds the share of a device's peak that is reached: assumptions, or calibrated values."""

    train_mfu: float = 0.40
    """Share of the device's operations per second in training (model FLOPs utilisation)."""
    prefill_mfu: float = 0.50
    """The same in prefill."""
    decode_share: float = 0.60
    """Share of the roofline, memory or operations, in decoding."""
    link_share: float = 0.70
    """Share of the bandwidth of links, network and host memory."""
    pass_s: float = 0.003
    """Further seconds per pass of a vLLM engine: scheduling and sampling."""
    layer_pass_s: float = 0.0009
    """Further seconds per pass and layer of a model that transformers runs without a CUDA graph."""
    micro_batch_layer_s: float = 0.003
    """Seconds per layer of a micro-batch, forward and backward, to launch kernels."""
    collective_hop_s: float = 1e-5
    """Seconds until a collective's first byte, per doubling of the devices."""
    critique_s: float = 0.001
    """Seconds of a program's verdict and critique of one rollout."""
    sampling_fit: tuple[float, float] | None = None
    """Measured here: seconds per pass, and per rollout in it; replaces the roofline of sampling."""
    measured: tuple[str, ...] = ()
    """Names of the fields that a calibration has set."""


@dataclass(frozen=True, slots=True)
class DecodingCost:
    """Computes the time that one replica of an engine takes to generate; in seconds."""

    fixed: float
    """Seconds per pass besides reading and computing."""
    weights: float
    """Seconds to read the weights, once per pass."""
    per_context: float
    """Seconds to read the keys and values of one token in the context."""
    per_row: float
    """Seconds to compute one token of one rollout."""
    prefill: float
    """Seconds per prompt token."""
    slots: int
    """Rollouts decoded at a time: as many as there is memory for keys and values."""

    def pass_seconds(self, rows: int | float, context: int | float) -> float:
        """Return the time of one token for each of ``rows`` rollouts with ``context`` tokens in all."""
        reading = self.weights + self.per_context * context
        return self.fixed + max(reading, self.per_row * rows)

    def decode_seconds(self, lengths_R: np.ndarray, context: int | float) -> float:
        """Return the time to decode rollouts that start together after ``context`` tokens each.

        Prefill is not included. Rollouts leave as they end, so that the last passes serve the longest
        alone. More rollouts than slots are treated as rounds of equal length distribution.
        """
        if len(lengths_R) > self.slots:
            rounds = len(lengths_R) / self.slots
            subset = np.sort(lengths_R)[:: int(np.ceil(rounds))]
            seconds = self.decode_seconds(subset, context)
            return seconds * rounds * len(subset) / min(self.slots, len(subset))
        ends_R = np.sort(lengths_R)
        rows_R = len(ends_R) - np.arange(len(ends_R))
        passes_R = np.diff(ends_R, prepend=0.0)
        cached_R = rows_R * (context + ends_R - passes_R / 2)
        reading_R = self.weights + self.per_context * cached_R
        pass_R = self.fixed + np.maximum(reading_R, self.per_row * rows_R)
        return float((passes_R * pass_R).sum())


@dataclass(frozen=True, slots=True)
class TrainingCost:
    """Computes the time that a group of trainers takes for a step; in seconds and operations."""

    work: StepWork
    trainers: int
    rate: float
    """Operations per second that one trainer reaches."""
    per_micro_batch: float
    """Seconds per micro-batch to launch kernels."""
    gather: float
    """Seconds per micro-batch to all-gather weights and reduce-scatter gradients."""
    optimizer: float

    def seconds(self, lengths_R: np.ndarray) -> float:
        """Return the time of a step over rollouts of these lengths, group after group.

        All trainers wait for the busiest; gathering weights overlaps with computing.
        """
        dealt = self.deal(lengths_R)
        flops_T, micro_T = self.flops(lengths_R, dealt), dealt.micro_batches_T
        computing = float((flops_T / self.rate + micro_T * self.per_micro_batch).max())
        communicating = float(micro_T.max()) * self.gather
        return self.work.updates * (max(computing, communicating) + self.optimizer)

    def deal(self, lengths_R: np.ndarray) -> DealtRollouts:
        """Return where rollouts of these lengths are trained on."""
        limit = self.work.load.micro_batch_tokens
        return deal(micro_batch_tokens(self.work, lengths_R), self.trainers, limit)

    def flops(self, lengths_R: np.ndarray, dealt: DealtRollouts) -> np.ndarray:
        """Return the operations of one update per trainer [T], without those that sharing saves."""
        flops_R = train_flops(self.work, lengths_R) - saved_flops(self.work, lengths_R, dealt)
        return np.bincount(dealt.trainer_R, flops_R, self.trainers)


def decoding_cost(
    shape: Shape, device: Device, efficiency: Efficiency, *, group: int, slots: int, engine: str
) -> DecodingCost:
    """Return the cost of one replica over ``group`` devices (tensor parallelism)."""
    bandwidth = device.bandwidth * efficiency.decode_share * group
    fixed = efficiency.pass_s if engine == "vllm" else efficiency.layer_pass_s * shape.layers
    if group > 1:  # two all-reduces per layer over the group
        fixed += 2 * shape.layers * efficiency.collective_hop_s * np.log2(group)
    token_bytes = 2 * shape.layers * shape.keys * SERVED_BYTES
    flops = 2 * (body_weights(shape) + shape.vocabulary * shape.hidden)
    cost = DecodingCost(
        fixed=float(fixed),
        weights=served_bytes(shape) / bandwidth,
        per_context=token_bytes / bandwidth,
        per_row=flops / (device.flops * efficiency.decode_share * group),
        prefill=2 * body_weights(shape) / (device.flops * efficiency.prefill_mfu * group),
        slots=slots,
    )
    if efficiency.sampling_fit is None or engine == "vllm":
        return cost
    fixed, per_row = efficiency.sampling_fit
    return DecodingCost(fixed, 0.0, 0.0, per_row, 0.0, slots)


def training_cost(
    work: StepWork, device: Device, efficiency: Efficiency, trainers: int
) -> TrainingCost:
    """Return the cost of trainers that shard weights evenly (FSDP)."""
    shape = work.load.shape
    return TrainingCost(
        work=work,
        trainers=trainers,
        rate=device.flops * efficiency.train_mfu,
        per_micro_batch=efficiency.micro_batch_layer_s * shape.layers,
        gather=gather_seconds(work, device, efficiency, trainers),
        optimizer=optimizer_seconds(work, device, trainers),
    )


def optimizer_seconds(work: StepWork, device: Device, trainers: int) -> float:
    """Return the time of AdamW on one trainer's shard: bound by memory, not by operations."""
    moved = ADAMW_NUMBERS_MOVED * FLOAT * work.load.trained / trainers
    return moved / (device.bandwidth * OPTIMIZER_BANDWIDTH_SHARE)


def gather_seconds(work: StepWork, device: Device, efficiency: Efficiency, trainers: int) -> float:
    """Return the communication of one micro-batch: all-gathers of weights, one reduce-scatter."""
    if trainers == 1:
        return 0.0
    load = work.load
    others = (trainers - 1) / trainers
    sent = gathers(work) * load.parameters * load.compute_bytes + load.trained * FLOAT
    calls = (gathers(work) + 1) * load.shape.layers
    bandwidth = device.bandwidth_between(trainers) * efficiency.link_share
    hops = float(np.ceil(np.log2(trainers)))
    return others * sent / bandwidth + calls * efficiency.collective_hop_s * hops


def weight_sync_bytes(work: StepWork) -> float:
    """Return the bytes of one weight sync: adapters, or all weights."""
    load = work.load
    return SERVED_BYTES * float(load.trained if load.adapters else load.parameters)


def weight_sync_seconds(
    work: StepWork, device: Device, efficiency: Efficiency, devices: int
) -> float:
    """Return the time of a weight sync to samplers on other devices, passed on in a chain."""
    return weight_sync_bytes(work) / (device.bandwidth_between(devices) * efficiency.link_share)


def wake_seconds(shape: Shape, device: Device, efficiency: Efficiency, group: int) -> float:
    """Return the time of an engine's sleep and wake-up: its weights to host memory and back."""
    host_bandwidth = device.host_gb_per_s * 1e9 * efficiency.link_share
    return 2 * served_bytes(shape) / group / host_bandwidth


def gathers(work: StepWork) -> int:
    """Return the all-gathers per micro-batch: forward, backward, and one per teacher pass."""
    return 2 + work.teacher_passes


def served_bytes(shape: Shape) -> int:
    """Return the bytes of a model's weights in an engine."""
    return SERVED_BYTES * shape.parameters


def body_weights(shape: Shape) -> int:
    """Return the weights that every token meets: all but embeddings and head."""
    ends = shape.vocabulary * shape.hidden * (1 if shape.tied else 2)
    return shape.parameters - ends


def sequence_flops(shape: Shape, tokens: np.ndarray, head_tokens: np.ndarray) -> np.ndarray:
    """Return the forward operations of sequences, of whose tokens ``head_tokens`` meet the head."""
    attention = 2 * shape.layers * shape.attention * tokens**2
    head = 2.0 * shape.vocabulary * shape.hidden * head_tokens
    return tokens * 2.0 * body_weights(shape) + attention + head


def student_flops(work: StepWork, lengths_R: np.ndarray) -> np.ndarray:
    """Return the operations of the student's forward pass over each rollout [R]."""
    return sequence_flops(work.load.shape, work.prompt + lengths_R, lengths_R)


def train_flops(work: StepWork, lengths_R: np.ndarray) -> np.ndarray:
    """Return the operations of one update per rollout [R]: student forward and backward, teacher."""
    load = work.load
    passes = (2 if load.adapters else 3) + load.recompute
    flops_R = passes * student_flops(work, lengths_R)
    if load.adapters:
        flops_R = flops_R + 6.0 * load.trained * (work.prompt + lengths_R)
    if work.teacher_passes:
        teacher_R = sequence_flops(load.shape, teacher_tokens(work, lengths_R), lengths_R)
        flops_R = flops_R + work.teacher_passes * teacher_R
    return flops_R


def saved_flops(work: StepWork, lengths_R: np.ndarray, dealt: DealtRollouts) -> np.ndarray:
    """Return the operations per rollout [R] that one update saves where prompts are computed once.

    Without a pass of its own (`has_prefix_pass`) a common prefix is shared in all but attention.
    """
    load = work.load
    own_pass = has_prefix_pass(work, len(dealt.micro_batches_T))
    student_R = work.prompt + lengths_R
    student = tokens_shared(work.shared, student_R, work.group_size, dealt, prefix_pass=own_pass)
    passes = (2 if load.adapters else 3) + load.recompute
    saved_R = passes * _saved_forward(load.shape, student)
    if load.adapters:
        saved_R = saved_R + 6.0 * load.trained * student.tokens_R
    if work.teacher_passes:
        teacher_R = teacher_tokens(work, lengths_R)
        shared = work.teacher_shared
        teacher = tokens_shared(shared, teacher_R, work.group_size, dealt, prefix_pass=own_pass)
        saved_R = saved_R + work.teacher_passes * _saved_forward(load.shape, teacher)
    return saved_R


def has_prefix_pass(work: StepWork, trainers: int) -> bool:
    """Return whether what all prompts of a micro-batch begin with has a pass of its own."""
    return trainers == 1 and not work.load.recompute


def prefill_tokens(work: StepWork, problems: float, batches: float) -> float:
    """Return the prompt tokens that one engine computes: those of all prompts once per batch."""
    prefix = work.shared.prefix
    return problems * (work.prompt - prefix) + min(batches, problems) * prefix


def _saved_forward(shape: Shape, shared: TokensShared) -> np.ndarray:
    """Return the operations of a forward pass over shared tokens [R], in attention of the prefix."""
    attention_R = 2 * shape.layers * shape.attention * shared.prefix_R**2
    return 2.0 * body_weights(shape) * shared.tokens_R + attention_R


def teacher_tokens(work: StepWork, lengths_R: np.ndarray) -> np.ndarray:
    """Return the length of each rollout's teacher sequence [R]; a trace is as long as the rollout."""
    trace_R = lengths_R if work.context_has_trace else 0.0
    return work.teacher_prompt + trace_R + lengths_R


def micro_batch_tokens(work: StepWork, lengths_R: np.ndarray) -> np.ndarray:
    """Return the tokens of each rollout in a micro-batch [R]: student and teacher sequence."""
    student_R = work.prompt + lengths_R
    return student_R + teacher_tokens(work, lengths_R) if work.teacher_passes else student_R
