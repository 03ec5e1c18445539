"""How many runs of a study go on at a time where it does not say."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
import torch

from selfteach.commands.study import jobs as processes
from selfteach.commands.study.jobs import Job, run_jobs, side_by_side
from selfteach.commands.study.run_study import jobs_of
from selfteach.config.recipe import Recipe
from selfteach.config.recipe_file import study_from
from selfteach.runtime import gc_pause


def jobs(device: str) -> list[Job]:
    recipe = Recipe.model_validate(
        {"model": {"device": device}, "context": {"type": "reference"}, "train": {"steps": 1}}
    )
    return [Job(None, "arm", seed, recipe, Path(f"run_{seed}")) for seed in range(2)]


@pytest.mark.parametrize(("device", "gpu"), [("auto", True), ("cuda", True), ("cpu", False)])
def test_runs_follow_one_another_on_a_gpu_alone(
    device: str, gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "GPU_DRIVERS", ("/",))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert side_by_side(jobs(device)) == (1 if gpu else os.cpu_count())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert side_by_side(jobs(device)) == os.cpu_count()


def test_without_a_driver_nobody_asks_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "GPU_DRIVERS", ("/nowhere",))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: pytest.fail("asked"))
    assert side_by_side(jobs("auto")) == os.cpu_count()


STUDY = {
    "model": {"path": "lab:two_styles"},
    "data": {"type": "lab"},
    "study": {"seeds": [0, 1]},
    "arms": {"grpo": {"objective": {"type": "grpo"}}, "told": {"context": {"type": "reference"}}},
    "variants": {
        "easy": {"title": "easy", "seeds": [0], "set": {"model": {"path": "lab:easy"}}},
        "slow": {"title": "slow", "seeds": [1], "set": {"optimizer": {"lr": 1e-6}}},
    },
}  # fmt: skip


def test_variants_untrained_models_come_last(tmp_path: Path) -> None:
    order = [(job.variant, job.arm, job.seed) for job in jobs_of(study_from(STUDY), tmp_path)]
    arms = ("base", "grpo", "told")
    assert order[:6] == [(None, arm, seed) for seed in (0, 1) for arm in arms]
    assert order[-2:] == [("easy", "base", 0), ("slow", "base", 1)]


def test_runs_of_one_model_and_seed_begin_alike(tmp_path: Path) -> None:
    alike = processes._beginning_alike(jobs_of(study_from(STUDY), tmp_path))
    own = tmp_path / "runs" / "grpo" / "seed_1"
    assert {folder.relative_to(tmp_path).as_posix() for folder in alike[own]} == {
        "runs/base/seed_1", "runs/told/seed_1",
        "variants/slow/base/seed_1", "variants/slow/grpo/seed_1", "variants/slow/told/seed_1",
    }  # fmt: skip


def _settings() -> None:
    """In a worker."""
    assert gc.get_threshold()[0] == gc_pause.PAUSED_THRESHOLD, "imports are still to come"
    if os.environ.get("GLIBC_TUNABLES") != "glibc.malloc.hugetlb=1":
        raise LookupError(os.environ.get("GLIBC_TUNABLES"))


def test_runs_processes_ask_for_huge_pages_and_nobody_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    run_jobs([], 1, lambda _: None, beside=_settings)
    assert "GLIBC_TUNABLES" not in os.environ
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.check=1")
    with pytest.raises(LookupError, match="check"):
        run_jobs([], 1, lambda _: None, beside=_settings)
    assert os.environ["GLIBC_TUNABLES"] == "glibc.malloc.check=1"
