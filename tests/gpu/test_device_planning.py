"""`selfteach plan` measures the device it runs on."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from runs_on_device import ALIGNED, recipe

from selfteach.commands.planning.devices import measured_here
from selfteach.commands.planning.plan import PlanRequest, plan, prepare

pytestmark = pytest.mark.gpu


def test_measurements_of_the_device_are_plausible(
    device: str, record_property: Callable[[str, object], None]
) -> None:
    first, again = measured_here(), measured_here()
    assert again.tflops == pytest.approx(first.tflops, rel=0.5)
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        assert first.memory == pytest.approx(properties.total_memory)
        # Hopper's sheet says 989 (dense bfloat16) and 3,350 GB/s; a GPU of five years ago, 65 and 320.
        assert 30 < first.tflops < 2500
        assert 200 < first.memory_gb_per_s < 10_000
        if "H100" in properties.name or "H200" in properties.name:
            assert first.tflops > 350 and first.memory_gb_per_s > 1500
    record_property("TFLOP/s and GB/s", (first.tflops, first.memory_gb_per_s))


def test_a_plan_is_calibrated_by_steps_taken_here(device: str) -> None:
    lab = recipe(device, ALIGNED)
    work, hardware = prepare(lab, PlanRequest(calibrate=("here",)))
    efficiency = hardware.efficiency
    assert work.load.shape.hidden > 0
    assert 0 < efficiency.train_mfu <= 1 and efficiency.decode_share > 0
    assert {"train_mfu", "decode_share", "critique_s"} <= set(efficiency.measured)
    assert any(re.search(r"step", line) for line in plan(lab, PlanRequest()))
