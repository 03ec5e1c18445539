"""The planner's error is that of the measurements in the repository, and a plan says it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from selfteach.commands.planning import accuracy
from selfteach.commands.planning.accuracy import ErrorSummary, comparisons, error_lines, summary
from selfteach.commands.planning.devices import known_devices
from selfteach.commands.planning.plan import PlanRequest, plan
from selfteach.config.recipe_file import load_study

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "training"))
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import plan_accuracy

    yield plan_accuracy
    for name in ("plan_accuracy", "harness"):
        sys.modules.pop(name, None)


def test_measurements_are_those_of_the_results(script: Any) -> None:
    assert accuracy.DATA.read_text(encoding="utf-8") == script.written(script.collected())
    for row in json.loads(accuracy.DATA.read_text(encoding="utf-8"))["measurements"]:
        assert (ROOT / row["source"].split(",")[0]).exists()


def test_the_page_shows_the_errors(script: Any) -> None:
    table = script.tables()[0].markdown().splitlines()[2:]
    assert "\n".join(table).strip() in (ROOT / "docs" / "planning.md").read_text(encoding="utf-8")


def test_calibrated_settings_are_those_of_the_page(script: Any) -> None:
    page = (ROOT / "docs" / "planning.md").read_text(encoding="utf-8")
    for setting, predicted, measured in script.CALIBRATED:
        assert f"| {setting} | {predicted:.3f} | {measured:.3f} |" in page


def test_the_gpus_step_is_predicted_from_its_data_sheet() -> None:
    """By hand: 32 rollouts of 1.5B, student forward and backward over 640 tokens, teacher over 896.

    Ten fit a micro-batch, so four groups of eight are in 10 + 10 + 10 + 2: seven prompts are computed.
    """
    (full,) = (
        row
        for row in comparisons()
        if row.device == "h200-sxm" and row.name == "Qwen2.5-1.5B, random weights: full"
    )
    body, head = 1_310_340_608, 151_936 * 1536

    def forward(tokens: int) -> float:
        attention = 2 * 28 * 1536 * tokens**2
        return 2 * body * tokens + attention + 2 * head * 512

    shared = (32 - 7) * 2 * body * (3 * 128 + 384)
    flops = 32 * (3 * forward(640) + forward(896)) - shared
    adamw = 7 * 4 * (body + head) / (0.6 * 4.8e12)
    expected = flops / (0.4 * 989e12) + 4 * 28 * 0.003 + adamw
    assert full.predicted == pytest.approx(expected, rel=2e-3)
    assert full.measured == pytest.approx(0.9251, abs=1e-4)


def test_excluded_measurements_do_not_count_and_have_a_reason() -> None:
    excluded = [row for row in comparisons() if row.excluded is not None]
    assert [row.excluded for row in excluded] == [
        "cuDNN's attention planned each shape anew; it has been turned off since"
    ]
    everything = summary()
    assert everything is not None and everything.count == len(comparisons()) - 1
    assert ErrorSummary(2, 1.0, 0.2, 4.0).worst == 0.2


def test_a_device_class_that_was_never_measured_is_named_so() -> None:
    measured = {row.device_class for row in comparisons()}
    assert measured == {"h200-sxm", "cpu"}
    for name in known_devices():
        (line,) = error_lines(name)
        assert line.startswith("error: " if name in measured else "never measured on this device")
    lines = list(error_lines("l4", ("train_mfu",)))
    assert len(lines) == 2 and "after a calibration" in lines[1]


def test_this_machine_is_a_cpu_or_the_gpu_that_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert accuracy.device_class("here") == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    assert accuracy.device_class("here") == "h200-sxm"
    for name in ("Radeon 42", "NVIDIA L40", "NVIDIA H200 NVL", "NVIDIA H100 NVL"):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda name=name: name)
        assert accuracy.device_class("here") == name, "a similar name is another device"
    names = [name for device in known_devices().values() for name in device.names]
    assert len(names) == len({*names}) == len(known_devices())


@pytest.mark.parametrize(
    ("device", "words"), [("h200-sxm", "error: the "), ("b200-sxm", "never measured")]
)
def test_a_plan_ends_with_its_error(device: str, words: str) -> None:
    study = load_study(ROOT / "src" / "selfteach" / "recipes" / "paper.toml")
    recipe = study.recipe("reference", seed=0)
    lines = list(plan(recipe, PlanRequest(device, trainers=1)))
    assert lines[-1].startswith(words)
