"""What one device, or a group of them, takes for a step: the arithmetic of a roofline.

Operations count a multiplication and an addition as two. A token costs 2 operations per weight that it
meets, forward, and attention to its past 2 A L per layer (A the width of all heads, L the length of the
sequence; under causal attention a token sees half of it). Going back costs as much again for the
inputs' gradients, and as much again for the weights' where they train. Only answer tokens meet the
head. Generating is another matter: each pass writes one token per answer and has to read all weights,
and the keys and values of all answers, from memory (Pope et al., arXiv:2211.05102).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from selfteach.commands.check.memory import FLOAT
from selfteach.models.architectures import Shape
from selfteach.planning.devices import Device
from selfteach.planning.workload import Work

SERVED_BYTES = 2
"""Of a weight, a key or a value in an engine: bfloat16."""
MOVED_SHARE = 0.6
"""Of the memory's bandwidth that AdamW has: assumed, and too little of a step to be measured."""
MOMENTS_MOVED = 7
"""Numbers that AdamW reads or writes per number that trains: weight, gradient, two moments; and all
but the gradient back."""


@dataclass(frozen=True, slots=True)
class Efficiency:
    """How much of what a device could do is had. Assumptions, until a calibration replaces them."""

    train_mfu: float = 0.40
    """Share of the device's operations per second while learning."""
    prefill_mfu: float = 0.50
    decode_share: float = 0.60
    """Share of the roofline, memory or operations, while generating."""
    link_share: float = 0.70
    """Share of what links, network and host's memory could carry."""
    pass_s: float = 0.003
    """Of each pass of a vLLM engine beyond that: scheduling and sampling."""
    layer_pass_s: float = 0.0009
    """The same per layer of a model that transformers runs without a graph."""
    layer_micro_s: float = 0.003
    """Per layer of a micro-batch forth and back: kernels are launched, whatever they do."""
    hop_s: float = 1e-5
    """Until a collective's first byte, per doubling of the devices."""
    mark_s: float = 0.001
    """A program's verdict and critique of one answer."""
    line: tuple[float, float] | None = None
    """Measured here: seconds of a pass, and of each answer in it; stands in for the roofline."""
    measured: tuple[str, ...] = ()
    """Names of the fields that a calibration has set."""


@dataclass(frozen=True, slots=True)
class Decoding:
    """What one replica of an engine takes to generate; seconds."""

    fixed: float
    """Of a pass."""
    weights: float
    """To read the weights, once a pass."""
    per_context: float
    """To read one token's keys and values."""
    per_row: float
    """For the operations of one answer's token."""
    prefill: float
    """Per prompt token."""
    slots: int
    """Answers at a time: as many as keys and values have room for."""

    def pass_seconds(self, rows: int | float, context: int | float) -> float:
        """One token for each of ``rows`` answers that hold ``context`` tokens together."""
        reading = self.weights + self.per_context * context
        return self.fixed + max(reading, self.per_row * rows)

    def drain(self, answers_A: np.ndarray, context: int | float) -> float:
        """All of these answers, begun together after ``context`` tokens each, without their prompts.

        Rows leave as they end, so that the last passes serve the longest answers alone. More answers
        than slots are taken as rounds of equal lengths.
        """
        if len(answers_A) > self.slots:
            rounds = len(answers_A) / self.slots
            some = np.sort(answers_A)[:: int(np.ceil(rounds))]
            return self.drain(some, context) * rounds * len(some) / min(self.slots, len(some))
        ends_A = np.sort(answers_A)
        rows_A = len(ends_A) - np.arange(len(ends_A))
        passes_A = np.diff(ends_A, prepend=0.0)
        held_A = rows_A * (context + ends_A - passes_A / 2)
        reading_A = self.weights + self.per_context * held_A
        each_A = self.fixed + np.maximum(reading_A, self.per_row * rows_A)
        return float((passes_A * each_A).sum())


@dataclass(frozen=True, slots=True)
class Learning:
    """What a group of trainers takes for a step; seconds, operations, bytes."""

    work: Work
    trainers: int
    rate: float
    """Operations per second of one trainer, as they are had."""
    per_micro: float
    gather: float
    """Of a micro-batch: to collect weights and to reduce gradients."""
    optimizer: float

    def seconds(self, answers_A: np.ndarray) -> float:
        """A step over answers of these lengths, dealt out to the trainers in turn.

        All wait for the one with most to do; collecting weights goes on beside the arithmetic.
        """
        work, ranks = self.work, np.arange(len(answers_A)) % self.trainers
        tokens_R = np.bincount(ranks, micro_tokens(work, answers_A), self.trainers)
        work_R = np.bincount(ranks, learn_flops(work, answers_A), self.trainers)
        micro_R = np.ceil(tokens_R / work.load.learn_tokens)
        computing = float((work_R / self.rate + micro_R * self.per_micro).max())
        moving = float(micro_R.max()) * self.gather
        return work.updates * (max(computing, moving) + self.optimizer)


def decoding(
    shape: Shape, device: Device, have: Efficiency, *, group: int, slots: int, engine: str
) -> Decoding:
    """One replica over ``group`` devices that split every weight (tensor parallelism)."""
    together = device.bandwidth * have.decode_share * group
    fixed = have.pass_s if engine == "vllm" else have.layer_pass_s * shape.layers
    if group > 1:  # two sums per layer over the group
        fixed += 2 * shape.layers * have.hop_s * np.log2(group)
    token = 2 * shape.layers * shape.keys * SERVED_BYTES
    flops = 2 * (body(shape) + shape.vocabulary * shape.hidden)
    decode = Decoding(
        fixed=float(fixed),
        weights=served_bytes(shape) / together,
        per_context=token / together,
        per_row=flops / (device.flops * have.decode_share * group),
        prefill=2 * body(shape) / (device.flops * have.prefill_mfu * group),
        slots=slots,
    )
    if have.line is None or engine == "vllm":
        return decode
    fixed, row = have.line
    return Decoding(fixed, 0.0, 0.0, row, 0.0, slots)


def learning(work: Work, device: Device, have: Efficiency, trainers: int) -> Learning:
    """A group of trainers that share weights evenly (FSDP)."""
    shape = work.load.shape
    return Learning(
        work=work,
        trainers=trainers,
        rate=device.flops * have.train_mfu,
        per_micro=have.layer_micro_s * shape.layers,
        gather=gather_seconds(work, device, have, trainers),
        optimizer=optimizer_seconds(work, device, trainers),
    )


def optimizer_seconds(work: Work, device: Device, trainers: int) -> float:
    """AdamW on one trainer's share of what trains: it reads and writes, and hardly computes."""
    moved = MOMENTS_MOVED * FLOAT * work.load.trained / trainers
    return moved / (device.bandwidth * MOVED_SHARE)


def gather_seconds(work: Work, device: Device, have: Efficiency, trainers: int) -> float:
    """Of one micro-batch: weights collected for each pass, gradients summed and scattered."""
    if trainers == 1:
        return 0.0
    load = work.load
    others = (trainers - 1) / trainers
    sent = gathers(work) * load.parameters * load.compute_bytes + load.trained * FLOAT
    calls = (gathers(work) + 1) * load.shape.layers
    reach = device.reach(trainers) * have.link_share
    return others * sent / reach + calls * have.hop_s * float(np.ceil(np.log2(trainers)))


def publish_bytes(work: Work) -> float:
    """What an engine needs of new weights: adapters, or all of them."""
    load = work.load
    return SERVED_BYTES * float(load.trained if load.adapters else load.parameters)


def publish_seconds(work: Work, device: Device, have: Efficiency, devices: int) -> float:
    """New weights to samplers on other devices, passed on from one to the next."""
    return publish_bytes(work) / (device.reach(devices) * have.link_share)


def wake_seconds(shape: Shape, device: Device, have: Efficiency, group: int) -> float:
    """An engine's weights out to the host's memory and back, so that others may use the device."""
    return 2 * served_bytes(shape) / group / (device.host_gb_per_s * 1e9 * have.link_share)


def gathers(work: Work) -> int:
    """How often a micro-batch collects the weights: forth, back, and once for each teacher's pass."""
    return 2 + work.teacher_sides


def served_bytes(shape: Shape) -> int:
    """Of a model's weights in an engine."""
    return SERVED_BYTES * shape.parameters


def body(shape: Shape) -> int:
    """Weights that every token meets: all but embeddings and head."""
    ends = shape.vocabulary * shape.hidden * (1 if shape.tied else 2)
    return shape.parameters - ends


def forward_flops(shape: Shape, tokens: np.ndarray, headed: np.ndarray) -> np.ndarray:
    """Operations of sequences of so many tokens, of which ``headed`` meet the head."""
    attention = 2 * shape.layers * shape.attention * tokens**2
    return tokens * 2.0 * body(shape) + attention + 2.0 * shape.vocabulary * shape.hidden * headed


def forward(work: Work, answers_A: np.ndarray) -> np.ndarray:
    """Operations of the student's pass over each answer."""
    return forward_flops(work.load.shape, work.prompt + answers_A, answers_A)


def learn_flops(work: Work, answers_A: np.ndarray) -> np.ndarray:
    """Operations of one update, per answer: student forth and back, teacher forth."""
    load = work.load
    passes = (2 if load.adapters else 3) + load.recompute
    flops = passes * forward(work, answers_A)
    if load.adapters:
        flops = flops + 6.0 * load.trained * (work.prompt + answers_A)
    if work.teacher_sides:
        teacher = forward_flops(load.shape, teacher_tokens(work, answers_A), answers_A)
        flops = flops + work.teacher_sides * teacher
    return flops


def teacher_tokens(work: Work, answers_A: np.ndarray) -> np.ndarray:
    """Length of the teacher's sequence for each answer; a trace is as long as the answer."""
    shown = answers_A if work.shows_trace else 0.0
    return work.teacher_prompt + shown + answers_A


def micro_tokens(work: Work, answers_A: np.ndarray) -> np.ndarray:
    """What each answer takes of a micro-batch: the student's sequence and the teacher's."""
    own = work.prompt + answers_A
    return own + teacher_tokens(work, answers_A) if work.teacher_sides else own
