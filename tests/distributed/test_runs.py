"""Whole runs in float64: a rank dies, another number of ranks goes on, and the end is the same."""

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
    rows_seen,
    until_a_rank_ends,
    until_told_to_end,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from selfteach.trainer.loop import run_to_end, train


@pytest.fixture(autouse=True, scope="module")
def _double() -> Any:
    yield from in_double()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that was never stopped, in one process."""
    folder = tmp_path_factory.mktemp("alone")
    run_to_end(recipe(), folder)
    return folder


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in pieces on two ranks of which the second ended in step 3, after a checkpoint."""
    folder = tmp_path_factory.mktemp("broken")
    message, nothing = on_ranks(2, until_a_rank_ends, recipe(**SHARDED), folder)
    assert "rank 0: another rank has ended" in message and nothing is None
    return folder


def test_two_ranks_go_on_after_one_has_died(broken: Path, alone: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(broken, tmp_path / "run")
    answers = sorted((folder / "rollouts").iterdir())
    before = {path.name: path.stat().st_mtime_ns for path in answers}
    rows, others = on_ranks(2, rows_seen, recipe(**SHARDED), folder)
    assert_same_run(folder, alone)
    assert others == [], "rank 0 alone talks"
    assert [row["step"] for row in rows if row["kind"] == "step"] == [3, 4], "not from the start"
    assert all(row["ranks"] == 2 for row in rows if row["kind"] == "step")
    for path in answers:
        assert path.stat().st_mtime_ns == before[path.name], "an answer on disk was sampled again"


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_checkpoint_in_pieces_is_taken_up_whole(
    ranks: int, broken: Path, alone: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(broken, tmp_path / "run")
    on_ranks(ranks, rows_seen, recipe(), folder)
    assert_same_run(folder, alone)


@pytest.mark.slow
def test_a_whole_checkpoint_is_taken_up_in_pieces(alone: Path, tmp_path: Path) -> None:
    stopping = train(recipe(), tmp_path)
    while next(stopping)["step"] < 3:
        pass
    stopping.close()
    on_ranks(2, rows_seen, recipe(**SHARDED), tmp_path)
    assert_same_run(tmp_path, alone)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float64)
    AutoTokenizer.from_pretrained(tmp_path / "model")
    assert model.config.architectures == ["LlamaForCausalLM"]


def test_sigterm_to_one_rank_ends_all_at_the_same_step(alone: Path, tmp_path: Path) -> None:
    rare = recipe(**SHARDED, train={"checkpoint_every": 4})
    assert on_ranks(2, until_told_to_end, rare, tmp_path) == ["ended", "ended"]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_000002"]
    rows, _ = on_ranks(2, rows_seen, rare, tmp_path)
    assert [row["step"] for row in rows if row["kind"] == "step"] == [3, 4]
    assert_same_run(tmp_path, alone)


@pytest.mark.slow
def test_adapters_in_pieces_are_exported_as_peft_reads_them(tmp_path: Path) -> None:
    lora = {"model": {"lora": {"rank": 2, "alpha": 4.0}}, "teacher": {"type": "initial"},
            "train": {"steps": 1}}  # fmt: skip
    for name, ranks, way in (("one", 1, {}), ("two", 2, SHARDED)):
        on_ranks(ranks, rows_seen, recipe(**lora, **way), tmp_path / name)
    one, two = (load_file(tmp_path / n / "model/adapter_model.safetensors") for n in ("one", "two"))
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=TOLERANCE)
