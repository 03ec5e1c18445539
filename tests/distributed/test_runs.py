"""Whole runs in float64: a rank dies, another number of ranks goes on, and the end is the same."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import selfteach.build as building
from on_ranks import on_ranks
from selfteach import launched, pipeline
from selfteach.config import Recipe
from selfteach.errors import EngineError, Terminated
from selfteach.run_folder import RunFolder
from selfteach.settings import merge
from selfteach.train import evaluation_of, result_of, run_to_end, train

RUN = {
    "data": {"type": "lab", "train": 12, "validation": 4, "test": 4},
    "sampling": {"max_tokens": 24, "batch_answers": 4},
    "critic": {"type": "oracle"},
    "context": {"type": "step_aligned"},
    "teacher": {"type": "ema", "rate": 0.2},
    "train": {
        "steps": 4, "problems_per_step": 3, "answers_per_problem": 2,
        "checkpoint_every": 2, "threads": 1,
    },
    "evaluation": {"every": 4, "validation_k": 2, "test_k": 2},
}  # fmt: skip
SHARDED = {"distributed": {"shard": "full", "timeout_seconds": 60}}
TOLERANCE = 1e-7
"""Of weights, after four updates in float64."""


def recipe(**changes: Any) -> Recipe:
    return Recipe.model_validate(merge(RUN, changes))


@pytest.fixture(autouse=True, scope="module")
def _double() -> Any:
    loaded = building.load_model
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(building, "load_model", lambda *told: loaded(*told).double())
        torch.set_default_dtype(torch.float64)
        yield
        torch.set_default_dtype(torch.float32)


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


def until_a_rank_ends(recipe: Recipe, folder: Path) -> str:
    learning = pipeline.take_in

    def dies(*args: Any, **more: Any) -> Any:
        if more["step"] == 3 and launched.rank() == 1:
            os._exit(9)
        return learning(*args, **more)

    pipeline.take_in = dies
    with pytest.raises(EngineError) as caught:
        run_to_end(recipe, folder)
    return str(caught.value)


def until_told_to_end(recipe: Recipe, folder: Path) -> str:
    """The second rank gets SIGTERM while it learns in step 2."""
    learning = pipeline.take_in

    def told(*args: Any, **more: Any) -> Any:
        if more["step"] == 2 and launched.rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return learning(*args, **more)

    pipeline.take_in = told
    with pytest.raises(Terminated):
        run_to_end(recipe, folder)
    return "ended"


def rows_seen(recipe: Recipe, folder: Path) -> list[dict[str, Any]]:
    return list(train(recipe, folder))


def assert_same_run(ours: Path, theirs: Path) -> None:
    """Weights, evaluation and metrics, but for the seconds."""
    a, b = (load_file(folder / "model" / "model.safetensors") for folder in (ours, theirs))
    assert a.keys() == b.keys()
    for name, value in b.items():
        torch.testing.assert_close(a[name], value, rtol=0, atol=TOLERANCE)
    assert evaluation_of(ours, "test", 4) == evaluation_of(theirs, "test", 4)
    for row, other in zip(RunFolder(ours).metrics(), RunFolder(theirs).metrics(), strict=True):
        for name in (row.keys() | other.keys()) - {"ranks", "kind"}:
            if not name.startswith(("seconds", "busy", "waiting", "overlap")):
                assert row[name] == pytest.approx(other[name], rel=1e-6, abs=1e-7), name
    own, other = result_of(ours)["budget"], result_of(theirs)["budget"]
    assert {**own, "seconds": 0} == {**other, "seconds": 0}


def test_two_ranks_go_on_after_one_has_died(broken: Path, alone: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(broken, tmp_path / "run")
    answers = sorted((folder / "answers").iterdir())
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
