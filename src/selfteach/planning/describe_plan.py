"""A forecast in lines: what goes where, what it takes, and on what all of it rests."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields

import numpy as np

from selfteach.commands.check.memory import gib
from selfteach.planning import costs
from selfteach.planning.costs import Decoding, Efficiency
from selfteach.planning.estimate import Forecast
from selfteach.planning.layout import Layout, check_lengths
from selfteach.planning.lengths import Spread

MEANING = {
    "train_mfu": "of the device's operations while learning",
    "prefill_mfu": "of the device's operations while prompts are read",
    "decode_share": "of the roofline while generating",
    "link_share": "of links, network and host's memory",
    "pass_s": "s of a pass of a vLLM engine besides the roofline",
    "layer_pass_s": "s per layer of a pass of transformers besides the roofline",
    "layer_micro_s": "s per layer of a micro-batch besides its operations",
    "hop_s": "s of a collective per doubling of the devices",
    "mark_s": "s in which a program marks an answer",
}


def describe(told: Forecast, *, explain: bool = False) -> Iterator[str]:
    """A forecast for people."""
    layout, work = told.layout, told.work
    yield f"plan for {_layout(layout, told)}"
    yield f"device: {told.where.name}: {told.where.device.source}"
    yield "memory of one device"
    for held in told.held:
        yield f"  {held.role}: {gib(held.bytes)} of {gib(int(held.room))} that may be filled"
        if explain:
            yield from (f"    {item.name}: {gib(item.bytes)} = {item.how}" for item in held.items)
    yield f"a step: {work.answers:,} answers to {work.problems:,} problems, staleness {work.staleness}"
    busy = dict(zip(told.phases, told.timeline.busy.values(), strict=True))
    for name, seconds in told.phases.items():
        tokens = told.tokens[name]
        counted = f"{tokens:,.0f} tokens, " if tokens else ""
        yield f"  {name}: {counted}{seconds:,.3g} s; at work {busy[name]:.0%} of the time"
    yield f"step time: {told.period:,.3g} s; {work.steps:,} steps: {_long(work.steps * told.period)}"
    yield f"bottleneck: {told.bottleneck}"
    if explain:
        yield "the arithmetic"
        yield from (f"  {line}" for line in _arithmetic(told))
    yield from _rests(told)


def _layout(layout: Layout, told: Forecast) -> str:
    parts = [f"{layout.trainers} to learn"]
    if layout.samplers:
        parts.append(
            f"{layout.samplers} to sample ({_groups(layout.samplers, layout.sampler_group)})"
        )
    else:
        parts[0] += " and sample"
    marker = told.work.asked.marker
    if layout.critics:
        parts.append(f"{layout.critics} to mark ({_groups(layout.critics, layout.critic_group)})")
    elif marker == "served":
        parts[0] += " and mark, in turns"
    elif marker == "latency":
        parts.append(f"a critic elsewhere that takes {told.line.latency:g} s a reply")
    count = layout.devices
    return f"{count} device{'s' if count > 1 else ''}: {', '.join(parts)}"


def _groups(devices: int, group: int) -> str:
    return f"{devices // group} × {group}"


def _rests(told: Forecast) -> Iterator[str]:
    """Assumptions, measured numbers and warnings."""
    have, work = told.where.have, told.work
    measured, rows = set(have.measured), {f.name: getattr(have, f.name) for f in fields(Efficiency)}
    yield "rests on"
    for name, meaning in MEANING.items():
        if name in measured or _counts(name, told):
            kind = "measured" if name in measured else "assumed"
            yield f"  {kind}: {rows[name]:.3g} {meaning}"
    if have.line is not None and not told.layout.samplers and work.engine != "vllm":
        yield (
            f"  measured: {have.line[0]:.3g} s a pass and {have.line[1]:.3g} s per answer in it; "
            "this stands in for the roofline of sampling"
        )
    yield f"  answers of {_spread(work.answer)}"
    if work.asked.critique is not None:
        yield f"  critiques of {_spread(work.asked.critique)}"
    if work.asked.marker in ("served", "latency"):
        wide, useful = work.asked.concurrency, work.answers * (1 + work.staleness)
        fewer = f", where {useful:,} answers can be on their way: raise critic.concurrency"
        yield f"  critic.concurrency = {wide:,}{fewer if wide < useful else ''}"
    if told.line.wake:
        yield (
            f"  engines that give way to others on their device: {told.line.wake:.3g} s a step to the "
            "host's memory and back"
        )
    if told.line.critics_share and work.asked.marker == "served":
        yield "  note: nothing here puts a served critic to sleep for its neighbours: you have to"
    if (warning := check_lengths(work)) is not None:
        yield f"  note: {warning}; what is longer is dropped and counted"


def _counts(name: str, told: Forecast) -> bool:
    """Whether an efficiency has a part in this plan."""
    layout, marker = told.layout, told.work.asked.marker
    vllm = bool(layout.samplers) or told.work.engine == "vllm" or marker == "served"
    match name:
        case "pass_s":
            return vllm
        case "layer_pass_s":
            return not layout.samplers and told.work.engine != "vllm"
        case "mark_s":
            return marker == "program"
        case "link_share" | "hop_s":
            return layout.devices > 1
        case _:
            return True


def _spread(spread: Spread) -> str:
    return (
        f"{spread.mean:,.0f} tokens on average (log-normal, σ {spread.sigma:.2f}, cut at "
        f"{spread.cap:,}, which {spread.cut:.0%} reach)"
    )


def _arithmetic(told: Forecast) -> Iterator[str]:
    line, work = told.line, told.work
    yield from _generation(
        "rollout", line.sampler, work.answers / line.samplers, line.prompt, line.answer
    )
    if line.critic is not None and line.critique is not None:
        rows = min(work.answers, line.concurrency) / line.critics
        read = line.critic_prompt + line.answer.mean
        yield from _generation("critique", line.critic, rows, read, line.critique)
    yield from _learning(told)
    if line.publish:
        yield (
            f"publishing: {costs.publish_bytes(work) / 1e9:.3g} GB of weights to the samplers: "
            f"{line.publish:.3g} s"
        )
    way = sum(told.phases.values()) + line.wake
    yield f"one step's way: {way:.3g} s; {1 + work.staleness} on the way at a time"


def _generation(
    name: str, cost: Decoding, rows: float, context: float, spread: Spread
) -> Iterator[str]:
    rows = min(rows, cost.slots)
    held = rows * (context + spread.mean / 2)
    reading = cost.weights + cost.per_context * held
    yield f"{name}: room for {cost.slots:,} answers in an engine, {rows:.3g} begin together"
    yield (
        f"{name}: a pass = {cost.fixed:.3g} s + the larger of reading {cost.weights:.3g} s of weights "
        f"+ {held:,.0f} tokens × {cost.per_context:.3g} s = {reading:.3g} s, and {rows:.3g} answers × "
        f"{cost.per_row:.3g} s = {rows * cost.per_row:.3g} s: {cost.pass_seconds(rows, held):.3g} s"
    )
    last = cost.pass_seconds(1, context + spread.cap)
    yield (
        f"{name}: prompts {context:,.0f} tokens × {cost.prefill:.3g} s; alone, an answer at the limit "
        f"takes {spread.cap:,} passes × {last:.3g} s = {spread.cap * last:.4g} s"
    )


def _learning(told: Forecast) -> Iterator[str]:
    work, learn = told.work, told.learning
    one = np.array([work.answer.mean])
    student = float(work.prompt + one[0])
    teacher = float(costs.teacher_tokens(work, one)[0]) if work.teacher_sides else 0.0
    flops = float(costs.learn_flops(work, one)[0])
    most = -(-work.answers // learn.trainers)
    yield (
        f"learning: an answer is {student:,.0f} tokens to the student, {teacher:,.0f} to the teacher: "
        f"{flops:.4g} operations (weights met {costs.body(work.load.shape):,})"
    )
    yield (
        f"learning: {most} answers on the busiest of {learn.trainers} trainers × {flops:.4g} / "
        f"{learn.rate:.4g} a second = {most * flops / learn.rate:.4g} s"
    )
    tokens = float(costs.micro_tokens(work, one)[0]) * most
    micro = int(np.ceil(tokens / work.load.learn_tokens))
    yield (
        f"learning: {micro} micro-batches × {learn.per_micro:.3g} s to launch; beside it {micro} × "
        f"{learn.gather:.3g} s to collect weights and reduce gradients; AdamW {learn.optimizer:.3g} s"
    )


def _long(seconds: float) -> str:
    """A long time in the units that people use."""
    for unit, size in (("days", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"
