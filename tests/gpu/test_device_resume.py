"""A run that was stopped and resumed on a device ends like the uninterrupted one.

Bitwise with ``train.deterministic``; without them attention's gradient is summed in the order
in which the device's cores finish, so that runs agree in their first step and little more.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from runs_on_device import ARMS, recipe
from same_run import checkpoint_weights, timeless_rows

from selfteach.config.recipe import Recipe
from selfteach.evaluation.evaluation_record import load_evaluation
from selfteach.trainer.loop import run_to_end, train

pytestmark = pytest.mark.gpu


def train_with_stops(run_recipe: Recipe, folder: Path) -> None:
    """Train, stop in the second and third step, and resume."""
    for rows in (2, 3):
        stopping = train(run_recipe, folder)
        for _ in range(rows):
            next(stopping)
        stopping.close()
    run_to_end(run_recipe, folder)


@pytest.mark.parametrize("arm", ["grpo, penalty", "step_aligned", "ema", "trust region", "lora"])
@pytest.mark.parametrize("autocast", [False, True])
def test_deterministic_algorithms_resume_bitwise(
    arm: str, autocast: bool, deterministic: None, device: str, tmp_path: Path
) -> None:
    more = {"model": {"autocast": "bfloat16"}} if autocast else {}
    run_recipe = recipe(device, ARMS[arm], more, {"train": {"steps": 4, "deterministic": True}})
    run_to_end(run_recipe, tmp_path / "whole")
    train_with_stops(run_recipe, tmp_path / "stopped")
    ours, theirs = (checkpoint_weights(tmp_path / name) for name in ("whole", "stopped"))
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name
    assert timeless_rows(tmp_path / "whole") == timeless_rows(tmp_path / "stopped")
    a, b = (load_evaluation(tmp_path / name, "test", 4) for name in ("whole", "stopped"))
    assert a == b


def test_without_them_the_first_step_agrees(
    device: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    run_recipe = recipe(device, ARMS["step_aligned"])
    for name in ("one", "two"):
        run_to_end(run_recipe, tmp_path / name)
    one, two = (timeless_rows(tmp_path / name) for name in ("one", "two"))
    first, again = (next(r for r in rows if r["kind"] == "step") for rows in (one, two))
    assert first.keys() == again.keys()
    for name in first.keys() - {"kind"}:
        assert first[name] == pytest.approx(again[name], rel=1e-3, abs=1e-6), name
    a, b = (checkpoint_weights(tmp_path / name) for name in ("one", "two"))
    identical = all(torch.equal(a[name], b[name]) for name in a)
    record_property("two plain runs are bitwise identical", identical)
