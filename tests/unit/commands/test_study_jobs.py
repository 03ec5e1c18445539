"""The runs of a study: their order, their number in parallel, and their processes."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
import torch

from selfteach.commands.study import jobs as study_jobs
from selfteach.commands.study.jobs import Job, default_workers, run_jobs
from selfteach.commands.study.run_study import jobs_of
from selfteach.config.recipe import Recipe
from selfteach.config.recipe_file import study_from
from selfteach.runtime import gc_pause
from selfteach.trainer import device_load
from selfteach.trainer.device_memory import memory


def jobs(device: str) -> list[Job]:
    recipe = Recipe.model_validate(
        {"model": {"device": device}, "context": {"type": "reference"}, "train": {"steps": 1}}
    )
    return [Job(None, "arm", seed, recipe, Path(f"run_{seed}")) for seed in range(2)]


@pytest.mark.parametrize(("device", "gpu"), [("auto", True), ("cuda", True), ("cpu", False)])
def test_runs_are_sequential_only_on_a_gpu(
    device: str, gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study_jobs, "GPU_DRIVERS", ("/",))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert default_workers(jobs(device)) == (1 if gpu else os.cpu_count())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert default_workers(jobs(device)) == os.cpu_count()


def test_without_a_gpu_driver_torch_is_not_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study_jobs, "GPU_DRIVERS", ("/nowhere",))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: pytest.fail("called"))
    assert default_workers(jobs("auto")) == os.cpu_count()


def test_runs_of_a_real_model_share_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {
        "model": {"path": "HuggingFaceTB/SmolLM2-135M-Instruct", "device": "cpu"},
        "context": {"type": "reference"},
        "train": {"steps": 1},
    }
    real = [Job(None, "arm", 0, Recipe.model_validate(values), Path("run"))]
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    peak = memory(device_load._load_by_config(real[0].recipe)).peak
    for runs in (1, 3):
        monkeypatch.setattr(device_load, "device_memory", lambda _, n=runs: n * peak + 1)
        assert default_workers(real) == runs
    assert default_workers(jobs("cpu")) == 64
    monkeypatch.setattr(device_load, "device_memory", lambda _: peak // 2)
    assert default_workers(real) == 1


STUDY = {
    "model": {"path": "lab:two_styles"},
    "data": {"type": "lab"},
    "study": {"seeds": [0, 1]},
    "arms": {"grpo": {"objective": {"type": "grpo"}}, "distilled": {"context": {"type": "reference"}}},
    "variants": {
        "easy": {"title": "easy", "seeds": [0], "set": {"model": {"path": "lab:easy"}}},
        "slow": {"title": "slow", "seeds": [1], "set": {"optimizer": {"lr": 1e-6}}},
    },
}  # fmt: skip


def test_variants_untrained_models_come_last(tmp_path: Path) -> None:
    order = [(job.variant, job.arm, job.seed) for job in jobs_of(study_from(STUDY), tmp_path)]
    arms = ("base", "grpo", "distilled")
    assert order[:6] == [(None, arm, seed) for seed in (0, 1) for arm in arms]
    assert order[-2:] == [("easy", "base", 0), ("slow", "base", 1)]


def test_runs_of_one_model_and_seed_share_initial_rollouts(tmp_path: Path) -> None:
    same = study_jobs._same_initial_rollouts(jobs_of(study_from(STUDY), tmp_path))
    folder = tmp_path / "runs" / "grpo" / "seed_1"
    assert {other.relative_to(tmp_path).as_posix() for other in same[folder]} == {
        "runs/base/seed_1", "runs/distilled/seed_1",
        "variants/slow/base/seed_1", "variants/slow/grpo/seed_1", "variants/slow/distilled/seed_1",
    }  # fmt: skip


def _settings() -> None:
    """Check the settings of a worker process, from inside it."""
    assert gc.get_threshold()[0] == gc_pause.PAUSED_THRESHOLD, "imports come after it"
    if os.environ.get("GLIBC_TUNABLES") != "glibc.malloc.hugetlb=1":
        raise LookupError(os.environ.get("GLIBC_TUNABLES"))


@pytest.mark.slow
def test_only_worker_processes_ask_for_huge_pages(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    run_jobs([], 1, lambda _: None, also=_settings)
    assert "GLIBC_TUNABLES" not in os.environ
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.check=1")
    with pytest.raises(LookupError, match="check"):
        run_jobs([], 1, lambda _: None, also=_settings)
    assert os.environ["GLIBC_TUNABLES"] == "glibc.malloc.check=1"
