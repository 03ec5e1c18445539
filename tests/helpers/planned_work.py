"""Work, devices and pipelines of a plan that is checked by hand."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

from selfteach.commands.check.sizes import measure_offline
from selfteach.commands.planning.costs import DecodingCost, Efficiency
from selfteach.commands.planning.devices import Device, find_device
from selfteach.commands.planning.estimate import Hardware
from selfteach.commands.planning.lengths import LengthDistribution
from selfteach.commands.planning.pipeline import Pipeline
from selfteach.commands.planning.workload import CriticWork, StepWork, work_of
from selfteach.config.recipe import Recipe
from selfteach.config.recipe_file import load_study
from selfteach.models.architectures import Shape
from selfteach.trainer.device_memory import DeviceLoad

PAPER = Path(__file__).parents[2] / "src" / "selfteach" / "recipes" / "paper.toml"
TINY = Shape("llama", 8, 16, 2, 2, 2, 4, 32, 512, True)
DEVICE = Device(
    memory_gib=1, tflops=1e-6, memory_gb_per_s=1e-3, link_gb_per_s=1e-3, devices_per_node=8,
    network_gb_per_s=1e-4, host_gb_per_s=1e-3, source="made up",
)  # fmt: skip
"""10⁶ operations and 10⁶ bytes per second."""
EXACT = Efficiency(1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0)


def constant(tokens: int) -> LengthDistribution:
    return LengthDistribution(math.log(tokens), 0.0, tokens)


def work(**changes: object) -> StepWork:
    load = DeviceLoad(
        shape=TINY, parameters=TINY.parameters, trained=TINY.parameters, adapters=None,
        weight_bytes=4, compute_bytes=4, recompute=False, copies=0, micro_batch_tokens=1000,
        chunk_entries=64, sample_rows=4, sample_length=20,
    )  # fmt: skip
    default = StepWork(
        load=load, steps=10, problems=4, group_size=1, batch_size=4, prompt=6.0,
        rollout_lengths=constant(10), teacher_prompt=0.0, context_has_trace=False,
        teacher_passes=0, updates=1, critic=CriticWork("none"),
        staleness=0, engine="transformers",
    )  # fmt: skip
    return dataclasses.replace(default, **changes)


FLAT = DecodingCost(0.01, 0.0, 0.0, 0.0, 0.0, 100)


def pipeline(**changes: object) -> Pipeline:
    default = Pipeline(
        batches=[8], group_size=1, prompt=10.0, rollout_lengths=constant(100), sampler=FLAT,
        samplers=1, train_seconds=lambda lengths: 2.0, critic_kind="latency", latency=3.0,
        concurrency=8,
    )  # fmt: skip
    return dataclasses.replace(default, **changes)


def paper(**changes: object) -> StepWork:
    recipe: Recipe = load_study(PAPER).recipe("step_aligned", seed=0)
    return dataclasses.replace(work_of(recipe, measure_offline(recipe)), engine="vllm", **changes)


H100 = Hardware("h100-sxm", find_device("h100-sxm"), Efficiency())
