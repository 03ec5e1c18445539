"""Runs of episodes on two ranks: each runs its share, and the result is that of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from episode_model import calculator_recipe, save_model
from on_ranks import on_ranks
from runs_on_ranks import assert_same_run, in_double, train_rows

from selfteach.config.recipe import Recipe
from selfteach.config.schema import merge
from selfteach.runtime.run_folder import RunFolder
from selfteach.trainer.loop import run_to_end

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True, scope="module")
def _double() -> Any:
    yield from in_double()


def recipe(model: Path, **changes: Any) -> Recipe:
    sizes = {
        "data": {"train": 12, "validation": 4, "test": 4},
        "sampling": {"batch_size": 4},
        "train": {"steps": 4, "problems_per_step": 3, "group_size": 2, "checkpoint_every": 2},
        "evaluation": {"every": 4, "validation_k": 2, "test_k": 2},
    }
    return calculator_recipe(model, **merge(sizes, changes))


@pytest.mark.parametrize("shard", ["none", "full"])
def test_two_ranks_end_in_the_weights_of_one(shard: str, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    run_to_end(recipe(model), tmp_path / "one")
    ranks = recipe(model, distributed={"shard": shard, "timeout_seconds": 60})
    on_ranks(2, train_rows, ranks, tmp_path / "two")
    assert_same_run(tmp_path / "two", tmp_path / "one")
    ours, theirs = (
        [row for row in RunFolder(tmp_path / name).metrics() if row["kind"] == "step"]
        for name in ("one", "two")
    )
    for one, two in zip(ours, theirs, strict=True):
        assert one["turns"] == two["turns"] and one["length"] == two["length"]
