"""Compare the planner with every measurement there is: its error, by class of device.

``measurements.json`` holds the measured seconds of phases, each with its work and its source;
``benchmarks/training/plan_accuracy.py`` collects them from the results of the benchmarks. Predictions
are those of a plan without calibration, from the device's rates and the assumed efficiencies.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from selfteach.commands.planning import costs
from selfteach.commands.planning.costs import Efficiency
from selfteach.commands.planning.devices import HERE, Device, known_devices
from selfteach.commands.planning.lengths import LengthDistribution
from selfteach.commands.planning.workload import CriticWork, SharedTokens, StepWork
from selfteach.models.architectures import Shape
from selfteach.trainer.device_memory import DeviceLoad

DATA = Path(__file__).with_name("measurements.json")
DEFAULTS: dict[str, Any] = {
    "trace": False, "micro_batch_tokens": 16_384, "bytes": 4, "teacher_prompt": 0, "problems": 4,
    "shared_prompt": 0, "shared_teacher_prompt": 0,
}  # fmt: skip
"""What a measurement's work is unless it says otherwise: all of a group's prompt is shared."""
CPU = "cpu"
"""The class of all CPUs, each with the rates that were measured beside its steps."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Holds one measurement and its prediction, in seconds."""

    name: str
    device: str
    device_class: str
    phase: str
    measured: float
    predicted: float
    source: str
    excluded: str | None
    """Why it does not count, such as a fault that has been removed since; None: it counts."""

    @property
    def ratio(self) -> float:
        """Return predicted / measured."""
        return self.predicted / self.measured


@dataclass(frozen=True, slots=True)
class ErrorSummary:
    """Holds the ratios predicted / measured of some measurements."""

    count: int
    median: float
    low: float
    high: float

    @property
    def worst(self) -> float:
        """Return the ratio that is farthest from 1, above or below."""
        return max(self.low, self.high, key=lambda ratio: abs(math.log(ratio)))


@cache
def comparisons() -> tuple[Comparison, ...]:
    """Return all measurements with their predictions."""
    data = json.loads(DATA.read_text(encoding="utf-8"))
    shapes = {name: Shape(**shape) for name, shape in data["shapes"].items()}
    devices = known_devices() | {
        name: Device(**rates) for name, rates in data["measured_devices"].items()
    }
    return tuple(
        Comparison(
            name=row["name"],
            device=row["device"],
            device_class=data["classes"][row["device"]],
            phase=row["phase"],
            measured=row["seconds"],
            predicted=predicted_seconds(row, shapes[row["shape"]], devices[row["device"]]),
            source=row["source"],
            excluded=row.get("excluded"),
        )
        for row in ({**DEFAULTS, **written} for written in data["measurements"])
    )


def predicted_seconds(row: dict[str, Any], shape: Shape, device: Device) -> float:
    """Return the seconds of one phase that a plan predicts without calibration."""
    work, lengths_R = work_of_row(row, shape), np.full(row["rollouts"], float(row["length"]))
    if row["phase"] == "train":
        return costs.training_cost(work, device, Efficiency(), 1).seconds(lengths_R)
    decoding = costs.decoding_cost(
        shape, device, Efficiency(), group=1, slots=row["rollouts"], engine="transformers"
    )
    prefill = costs.prefill_tokens(work, row["problems"], 1) * decoding.prefill
    return decoding.decode_seconds(lengths_R, row["prompt"]) + prefill


def work_of_row(row: dict[str, Any], shape: Shape) -> StepWork:
    """Return the work of a measurement, whose rollouts are all of one length."""
    size = row["bytes"]
    load = DeviceLoad(
        shape=shape, parameters=shape.parameters, trained=shape.parameters, adapters=None,
        weight_bytes=size, compute_bytes=size, recompute=False, copies=1,
        micro_batch_tokens=row["micro_batch_tokens"], chunk_entries=0,
        sample_rows=row["rollouts"], sample_length=row["prompt"] + row["length"],
    )  # fmt: skip
    return StepWork(
        load=load, steps=1, problems=row["problems"], group_size=row["rollouts"] // row["problems"],
        batch_size=row["rollouts"], prompt=float(row["prompt"]),
        rollout_lengths=LengthDistribution.with_mean(row["length"], row["length"]),
        teacher_prompt=float(row["teacher_prompt"]), context_has_trace=row["trace"],
        teacher_passes=int(row["teacher_prompt"] > 0), updates=1, critic=CriticWork("none"),
        staleness=0, engine="transformers",
        shared=SharedTokens(row["shared_prompt"], row["prompt"]),
        teacher_shared=SharedTokens(row["shared_teacher_prompt"], row["teacher_prompt"]),
    )  # fmt: skip


def summary(device_class: str | None = None, phase: str | None = None) -> ErrorSummary | None:
    """Return the error over a class of devices and a phase (None: all); None without measurements."""
    ratios = [
        row.ratio
        for row in comparisons()
        if row.excluded is None
        and device_class in (None, row.device_class)
        and phase in (None, row.phase)
    ]
    return ErrorSummary(len(ratios), median(ratios), min(ratios), max(ratios)) if ratios else None


def device_class(name: str) -> str:
    """Return the class of a device that a plan names; ``here`` without a GPU is a CPU."""
    if name != HERE:
        return name
    import torch

    if not torch.cuda.is_available():
        return CPU
    gpu = torch.cuda.get_device_name()
    return next((name for name, known in known_devices().items() if gpu in known.names), gpu)


def error_lines(device: str, calibrated: Sequence[str] = ()) -> Iterator[str]:
    """Yield what is known of a plan's error on a device; ``calibrated`` are measured efficiencies."""
    kind = device_class(device)
    here, everywhere = summary(kind), summary()
    assert everywhere is not None
    if here is None:
        yield (
            f"never measured on this device class ({kind}): no prediction for it was ever checked; on "
            f"others ({', '.join(_classes())}) the {everywhere.count} checked ones are "
            f"{_span(everywhere)}"
        )
    else:
        yield (
            f"error: the {here.count} measured phases on this device class ({kind}), each a training "
            f"or sampling of one step, were predicted without calibration at {_span(here)}"
        )
    if calibrated:
        ratios = [row["predicted"] / row["measured"] for row in _calibrated()]
        yield (
            f"error after a calibration: {len(ratios)} settings of the lab on a CPU were predicted at "
            f"{min(ratios):.2f} to {max(ratios):.2f} times the measured time; no GPU was"
        )


def _calibrated() -> list[dict[str, Any]]:
    return json.loads(DATA.read_text(encoding="utf-8"))["calibrated"]


def _classes() -> list[str]:
    return sorted({row.device_class for row in comparisons()})


def _span(error: ErrorSummary) -> str:
    return (
        f"{error.low:.2f} to {error.high:.2f} times the measured time, {error.median:.2f} times in the "
        "median"
    )
