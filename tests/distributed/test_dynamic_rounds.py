"""Dynamic sampling on ranks: all take the same rounds, and the result is that of one process."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from on_ranks import on_ranks
from runs_on_ranks import assert_same_run, in_double, recipe, train_rows

from selfteach.config.recipe import Recipe
from selfteach.runtime.run_folder import RunFolder
from selfteach.trainer.loop import run_to_end


@pytest.fixture(autouse=True, scope="module")
def _double() -> Any:
    yield from in_double()


def dynamic() -> Recipe:
    return recipe(
        critic=False, context={"type": "none"}, teacher={"type": "initial"},
        objective={"type": "grpo", "loss_type": "grpo", "importance_level": "sequence"},
        sampling={"max_tokens": 40, "batch_size": 3, "dynamic_rounds": 3},
        train={"steps": 2, "group_size": 3, "num_iterations": 2},
    )  # fmt: skip


@pytest.mark.slow
def test_two_ranks_take_the_rounds_of_one_process(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    run_to_end(dynamic(), one)
    steps = [row for row in RunFolder(one).metrics() if row["kind"] == "step"]
    assert max(row["sampling_rounds"] for row in steps) > 1
    on_ranks(2, train_rows, dynamic(), two)
    assert_same_run(two, one, step=2)
    names = [sorted(path.name for path in (folder / "rollouts").iterdir()) for folder in (one, two)]
    assert names[0] == names[1]
    # Another number of ranks goes on where one process has sampled.
    for name in ("result.json", "checkpoints"):
        path = one / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    before = {path: path.stat().st_mtime_ns for path in (one / "rollouts").iterdir()}
    on_ranks(2, train_rows, dynamic(), one)
    assert {path: path.stat().st_mtime_ns for path in (one / "rollouts").iterdir()} == before
