"""Whole runs in float64: a rank dies, another number of ranks resumes, and the result is the same."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from on_ranks import on_ranks
from runs_on_ranks import (
    SHARDED,
    TOLERANCE,
    assert_same_run,
    in_double,
    recipe,
    run_until_a_rank_dies,
    run_until_sigterm,
    train_rows,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from selfteach.trainer.loop import run_to_end, train


@pytest.fixture(autouse=True, scope="module")
def _double() -> Any:
    yield from in_double()


@pytest.fixture(scope="module")
def single_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in one process that was never stopped."""
    folder = tmp_path_factory.mktemp("single_run")
    run_to_end(recipe(), folder)
    return folder


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sharded run on two ranks of which the second died in step 3, after a checkpoint."""
    folder = tmp_path_factory.mktemp("broken")
    message, no_result = on_ranks(2, run_until_a_rank_dies, recipe(**SHARDED), folder)
    assert "rank 0: another rank has ended" in message and no_result is None
    return folder


def test_two_ranks_resume_after_one_has_died(
    broken: Path, single_run: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(broken, tmp_path / "run")
    paths = sorted((folder / "rollouts").iterdir())
    before = {path.name: path.stat().st_mtime_ns for path in paths}
    rows, others = on_ranks(2, train_rows, recipe(**SHARDED), folder)
    assert_same_run(folder, single_run)
    assert others == [], "only rank 0 yields rows"
    assert [row["step"] for row in rows if row["kind"] == "step"] == [3, 4], "not from the start"
    assert all(row["ranks"] == 2 for row in rows if row["kind"] == "step")
    for path in paths:
        assert path.stat().st_mtime_ns == before[path.name], "a rollout on disk was sampled again"


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_sharded_checkpoint_resumes_unsharded(
    ranks: int, broken: Path, single_run: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(broken, tmp_path / "run")
    on_ranks(ranks, train_rows, recipe(), folder)
    assert_same_run(folder, single_run)


@pytest.mark.slow
def test_an_unsharded_checkpoint_resumes_sharded(single_run: Path, tmp_path: Path) -> None:
    stopping = train(recipe(), tmp_path)
    while next(stopping)["step"] < 3:
        pass
    stopping.close()
    on_ranks(2, train_rows, recipe(**SHARDED), tmp_path)
    assert_same_run(tmp_path, single_run)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float64)
    AutoTokenizer.from_pretrained(tmp_path / "model")
    assert model.config.architectures == ["LlamaForCausalLM"]


def test_sigterm_to_one_rank_ends_all_at_the_same_step(single_run: Path, tmp_path: Path) -> None:
    rarely_saved = recipe(**SHARDED, train={"checkpoint_every": 4})
    assert on_ranks(2, run_until_sigterm, rarely_saved, tmp_path) == ["ended", "ended"]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_000002"]
    rows, _ = on_ranks(2, train_rows, rarely_saved, tmp_path)
    assert [row["step"] for row in rows if row["kind"] == "step"] == [3, 4]
    assert_same_run(tmp_path, single_run)


@pytest.mark.slow
def test_sharded_adapters_are_exported_in_peft_format(tmp_path: Path) -> None:
    lora = {"model": {"lora": {"rank": 2, "alpha": 4.0}}, "teacher": {"type": "initial"},
            "train": {"steps": 1}}  # fmt: skip
    for name, ranks, variant in (("one", 1, {}), ("two", 2, SHARDED)):
        on_ranks(ranks, train_rows, recipe(**lora, **variant), tmp_path / name)
    one, two = (load_file(tmp_path / n / "model/adapter_model.safetensors") for n in ("one", "two"))
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=TOLERANCE)
