"""How many runs of a study go on at a time where it does not say."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from selfteach import study
from selfteach.config import Recipe
from selfteach.study import Job, side_by_side


def jobs(device: str) -> list[Job]:
    recipe = Recipe.model_validate(
        {"model": {"device": device}, "context": {"type": "reference"}, "train": {"steps": 1}}
    )
    return [Job(None, "arm", seed, recipe, Path(f"run_{seed}")) for seed in range(2)]


@pytest.mark.parametrize(("device", "gpu"), [("auto", True), ("cuda", True), ("cpu", False)])
def test_runs_follow_one_another_on_a_gpu_alone(
    device: str, gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study, "GPU_DRIVERS", ("/",))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert side_by_side(jobs(device)) == (1 if gpu else os.cpu_count())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert side_by_side(jobs(device)) == os.cpu_count()


def test_without_a_driver_nobody_asks_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "GPU_DRIVERS", ("/nowhere",))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: pytest.fail("asked"))
    assert side_by_side(jobs("auto")) == os.cpu_count()
