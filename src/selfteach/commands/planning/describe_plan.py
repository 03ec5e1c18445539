"""Print a forecast: the layout, memory, times, the bottleneck, and every assumption behind them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from selfteach.commands.planning import costs
from selfteach.commands.planning.accuracy import error_lines
from selfteach.commands.planning.costs import DecodingCost
from selfteach.commands.planning.estimate import Forecast
from selfteach.commands.planning.layout import Layout, window_warning
from selfteach.commands.planning.lengths import LengthDistribution
from selfteach.commands.planning.workload import CriticWork
from selfteach.trainer.device_memory import gib

MEANING = {
    "train_mfu": "of the device's operations in training",
    "prefill_mfu": "of the device's operations in prefill",
    "decode_share": "of the roofline in decoding",
    "link_share": "of the bandwidth of links, network and host memory",
    "pass_s": "s per pass of a vLLM engine besides the roofline",
    "layer_pass_s": "s per layer of a pass of transformers besides the roofline",
    "micro_batch_layer_s": "s per layer of a micro-batch besides its operations",
    "collective_hop_s": "s of a collective per doubling of the devices",
    "critique_s": "s per rollout of a program's verdict and critique",
}


def describe(plan: Forecast, *, explain: bool = False) -> Iterator[str]:
    """Yield the lines of a plan; ``explain`` adds each memory item and the arithmetic."""
    work = plan.work
    yield f"plan for {_layout(plan)}"
    yield f"device: {plan.hardware.name}: {plan.hardware.device.source}"
    yield "memory of one device"
    for row in plan.memory:
        yield f"  {row.role}: {gib(row.bytes)} of {gib(int(row.available))} usable"
        if explain:
            yield from (
                f"    {item.name}: {gib(item.bytes)} = {item.arithmetic}" for item in row.items
            )
    yield (
        f"a step: {work.rollouts:,} rollouts of {work.problems:,} problems, staleness "
        f"{work.staleness}"
    )
    if work.rounds:
        yield (
            f"  in up to {1 + work.rounds} rounds, one after another: about "
            f"{work.rollouts * work.sampled_share:,.0f} rollouts, of which "
            f"{work.rollouts * work.trained_share:,.0f} are trained on"
        )
    active = dict(zip(plan.phases, plan.timeline.active.values(), strict=True))
    for phase, seconds in plan.phases.items():
        tokens = plan.tokens[phase]
        prefix = f"{tokens:,.0f} tokens, " if tokens else ""
        yield f"  {phase}: {prefix}{seconds:,.3g} s; active {active[phase]:.0%} of the time"
    yield (
        f"step time: {plan.period:,.3g} s; {work.steps:,} steps: "
        f"{_duration(work.steps * plan.period)}"
    )
    yield f"bottleneck: {plan.bottleneck}"
    if explain:
        yield "the arithmetic"
        yield from (f"  {line}" for line in _arithmetic(plan))
    yield "based on"
    lines = (*_efficiencies(plan), *_lengths(plan), *_shared_prompts(plan), *_notes(plan))
    yield from (f"  {line}" for line in lines)
    yield from error_lines(plan.hardware.name, plan.hardware.efficiency.measured)


def _layout(plan: Forecast) -> str:
    layout, critic = plan.layout, plan.work.critic
    roles = [f"{layout.trainers} to train"]
    if layout.samplers:
        replicas = _replicas(layout.samplers, layout.sampler_group)
        roles.append(f"{layout.samplers} to sample ({replicas})")
    else:
        roles[0] += " and sample"
    if layout.critics:
        replicas = _replicas(layout.critics, layout.critic_group)
        roles.append(f"{layout.critics} to serve the critic ({replicas})")
    elif critic.kind == "served":
        roles[0] += " and serve the critic, in turns"
    elif critic.kind == "latency":
        roles.append(f"a critic elsewhere with {plan.pipeline.latency:g} s per reply")
    count = layout.devices
    return f"{count} device{'s' if count > 1 else ''}: {', '.join(roles)}"


def _replicas(devices: int, group: int) -> str:
    return f"{devices // group} × {group}"


def _efficiencies(plan: Forecast) -> Iterator[str]:
    """Yield assumed and measured efficiencies that matter for this plan."""
    efficiency = plan.hardware.efficiency
    for name, meaning in MEANING.items():
        measured = name in efficiency.measured
        if measured or _matters(name, plan.layout, plan.work.engine, plan.work.critic):
            kind = "measured" if measured else "assumed"
            yield f"{kind}: {getattr(efficiency, name):.3g} {meaning}"
    fit = efficiency.sampling_fit
    if fit is not None and not plan.layout.samplers and plan.work.engine != "vllm":
        yield (
            f"measured: {fit[0]:.3g} s per pass and {fit[1]:.3g} s per rollout in it; these replace "
            "the roofline of sampling"
        )


def _lengths(plan: Forecast) -> Iterator[str]:
    yield f"rollouts of {_distribution(plan.work.rollout_lengths)}"
    if plan.work.critic.critique_lengths is not None:
        yield f"critiques of {_distribution(plan.work.critic.critique_lengths)}"


def _shared_prompts(plan: Forecast) -> Iterator[str]:
    """Yield what is assumed of prompts that begin alike, and who computes that once."""
    work = plan.work
    begins = f"{work.shared.of_all:,.0f} of {work.prompt:,.0f} tokens"
    group = f"{work.shared.of_group:,.0f}"
    if work.teacher_passes:
        shared = work.teacher_shared
        begins += f" (the teacher's: {shared.of_all:,.0f} of {work.teacher_prompt:,.0f})"
        group += f" (the teacher's: {shared.of_group:,.0f})"
    yield f"assumed: all prompts begin with the same {begins}, those of a group with the same {group}"
    yield "  a sampler computes these once per batch, a trainer once per micro-batch"


def _notes(plan: Forecast) -> Iterator[str]:
    """Yield settings that matter, and warnings."""
    work, critic, pipeline = plan.work, plan.work.critic, plan.pipeline
    if work.rounds:
        yield (
            f"assumed: {work.mixed_share:.0%} of the groups are mixed (--mixed-groups); the rest are "
            "sampled in vain"
        )
    if critic.kind in ("served", "latency"):
        useful = work.rollouts * (1 + work.staleness)
        advice = f", where {useful:,} rollouts can be in flight: raise critic.concurrency"
        yield f"critic.concurrency = {critic.concurrency:,}" + (
            advice if critic.concurrency < useful else ""
        )
    if pipeline.sleep_and_wake:
        yield f"engines that share a device sleep and wake up: {pipeline.sleep_and_wake:.3g} s per step"
    if pipeline.critic_shares_devices and critic.kind == "served":
        yield (
            "note: selfteach does not put a served critic to sleep; where it shares devices, do so "
            "yourself"
        )
    if (warning := window_warning(work)) is not None:
        yield f"note: {warning}; longer samples are dropped and counted"


def _matters(name: str, layout: Layout, engine: str, critic: CriticWork) -> bool:
    """Return True if an efficiency affects a plan with this layout."""
    match name:
        case "pass_s":
            return bool(layout.samplers) or engine == "vllm" or critic.kind == "served"
        case "layer_pass_s":
            return not layout.samplers and engine != "vllm"
        case "critique_s":
            return critic.kind == "program"
        case "link_share" | "collective_hop_s":
            return layout.devices > 1
        case _:
            return True


def _distribution(lengths: LengthDistribution) -> str:
    return (
        f"{lengths.mean:,.0f} tokens on average (log-normal, σ {lengths.sigma:.2f}, truncated at "
        f"{lengths.cap:,}, which {lengths.truncated_share:.0%} reach)"
    )


def _arithmetic(plan: Forecast) -> Iterator[str]:
    pipeline, work = plan.pipeline, plan.work
    rollouts = work.rollouts / pipeline.samplers
    yield from _decoding(
        "rollout", pipeline.sampler, rollouts, pipeline.prompt, pipeline.rollout_lengths
    )
    if pipeline.critic is not None and pipeline.critique_lengths is not None:
        rows = min(work.rollouts, pipeline.concurrency) / pipeline.critics
        context = pipeline.critic_prompt + pipeline.rollout_lengths.mean
        yield from _decoding("critique", pipeline.critic, rows, context, pipeline.critique_lengths)
    yield from _training(plan)
    if pipeline.weight_sync:
        yield (
            f"weight sync: {costs.weight_sync_bytes(work) / 1e9:.3g} GB of weights to the samplers: "
            f"{pipeline.weight_sync:.3g} s"
        )
    latency = sum(plan.phases.values()) + pipeline.sleep_and_wake
    yield f"one step from start to end: {latency:.3g} s; {1 + work.staleness} in flight at a time"


def _decoding(
    phase: str, cost: DecodingCost, rows: float, context: float, lengths: LengthDistribution
) -> Iterator[str]:
    rows = min(rows, cost.slots)
    cached = rows * (context + lengths.mean / 2)
    reading = cost.weights + cost.per_context * cached
    yield f"{phase}: an engine decodes up to {cost.slots:,} sequences, {rows:.3g} start together"
    yield (
        f"{phase}: a pass = {cost.fixed:.3g} s + the larger of reading {cost.weights:.3g} s of weights "
        f"+ {cached:,.0f} tokens × {cost.per_context:.3g} s = {reading:.3g} s, and {rows:.3g} "
        f"sequences × {cost.per_row:.3g} s = {rows * cost.per_row:.3g} s: "
        f"{cost.pass_seconds(rows, cached):.3g} s"
    )
    last = cost.pass_seconds(1, context + lengths.cap)
    yield (
        f"{phase}: prefill of {context:,.0f} tokens × {cost.prefill:.3g} s; one sequence alone at the "
        f"limit takes {lengths.cap:,} passes × {last:.3g} s = {lengths.cap * last:.4g} s"
    )


def _training(plan: Forecast) -> Iterator[str]:
    work, training = plan.work, plan.training
    lengths_R = np.full(work.rollouts, work.rollout_lengths.mean)
    student = float(work.prompt + lengths_R[0])
    teacher = float(costs.teacher_tokens(work, lengths_R)[0]) if work.teacher_passes else 0.0
    flops = float(costs.train_flops(work, lengths_R)[0])
    dealt = training.deal(lengths_R)
    flops_T = training.flops(lengths_R, dealt)
    most, micro_batches = -(-work.rollouts // training.trainers), dealt.micro_batches_T.max()
    yield (
        f"train: a rollout is {student:,.0f} tokens to the student, {teacher:,.0f} to the teacher: "
        f"{flops:.4g} operations (weights per token {costs.body_weights(work.load.shape):,})"
    )
    yield (
        f"train: {most} rollouts on the busiest of {training.trainers} trainers × {flops:.4g}, less "
        f"{most * flops - flops_T.max():.4g} for what prompts share, / {training.rate:.4g} per second "
        f"= {flops_T.max() / training.rate:.4g} s"
    )
    yield (
        f"train: {micro_batches} micro-batches × {training.per_micro_batch:.3g} s to launch, "
        f"overlapped with {micro_batches} × {training.gather:.3g} s to gather weights and reduce "
        f"gradients; AdamW {training.optimizer:.3g} s"
    )


def _duration(seconds: float) -> str:
    """Format a long time in days, hours or minutes."""
    for unit, size in (("days", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"
