"""How work is divided over ranks, without starting any."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from selfteach import cli
from selfteach.commands import console_script
from selfteach.config.recipe import Recipe
from selfteach.config.schema import validate
from selfteach.errors import RecipeError
from selfteach.runtime import torchrun
from selfteach.runtime.distributed import SINGLE_PROCESS, Ranks
from selfteach.trainer.batching import collate
from selfteach.trainer.build import build_sharding
from selfteach.trainer.loop import run_to_end
from selfteach.types import (
    CritiquedRollout,
    Problem,
    Rollout,
    TokenWeights,
    TrainingSample,
    Verdict,
)


@given(st.integers(0, 20), st.integers(1, 7))
def test_shares_are_contiguous_and_cover_all_items(items: int, size: int) -> None:
    shares = [list(Ranks(rank, size).share(range(items))) for rank in range(size)]
    assert [i for share in shares for i in share] == list(range(items))
    lengths = [len(share) for share in shares]
    assert max(lengths) - min(lengths) <= 1


def test_a_single_process_uses_no_collective() -> None:
    assert (
        SINGLE_PROCESS.is_main
        and SINGLE_PROCESS.gather([1, 2]) == [1, 2]
        and SINGLE_PROCESS.broadcast("a") == "a"
    )
    assert SINGLE_PROCESS.sum(3) == 3 and SINGLE_PROCESS.any(True) and not SINGLE_PROCESS.any(False)
    values_N = torch.tensor([1.0, 2.0, 6.0])
    assert SINGLE_PROCESS.mean(values_N) == 3 and SINGLE_PROCESS.max(values_N) == 6
    assert SINGLE_PROCESS.mean(values_N[:0]) == SINGLE_PROCESS.max(values_N[:0]) == 0


def sample(length: int, with_teacher: bool) -> tuple[TrainingSample, TokenWeights]:
    ids = tuple(range(1, length + 1))
    rollout = Rollout(Problem("q", "?", "a"), 0, (1, 2), ids, (-1.0,) * length, "", True, 0)
    training_sample = TrainingSample(
        CritiquedRollout(rollout, Verdict(True, True, None), None),
        None,
        (1,) if with_teacher else None,
    )
    return training_sample, TokenWeights((0.5,) * length)


@given(
    st.lists(st.tuples(st.integers(1, 9), st.booleans()), max_size=9),
    st.integers(1, 4),
    st.sampled_from([1, 30, 1000]),
)
def test_every_sample_is_in_one_micro_batch_and_ranks_have_equal_kinds(
    kinds: list[tuple[int, bool]], size: int, tokens: int
) -> None:
    pairs = [sample(*kind) for kind in kinds]
    samples, token_weights = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    dealt = [
        collate(
            samples, token_weights, pad_id=0, micro_batch_tokens=tokens, ranks=Ranks(rank, size)
        )
        for rank in range(size)
    ]
    kinds_of = [[batch.teacher is not None for batch in batches] for batches in dealt]
    assert all(kinds_of[0] == other for other in kinds_of)
    lengths = [
        len(batch.ids_N[batch.student.rows_N == row])
        for batches in dealt for batch in batches for row in range(len(batch.student.ids_BT))
    ]  # fmt: skip
    assert sorted(length for length in lengths if length) == sorted(length for length, _ in kinds)
    if size == 1:
        assert all(len(batch.ids_N) for batch in dealt[0]), "one rank gets no empty micro-batch"


def test_a_step_must_have_a_batch_for_each_rank() -> None:
    recipe = Recipe.model_validate({"train": {"steps": 0, "problems_per_step": 5, "group_size": 4}})
    with pytest.raises(RecipeError, match=r"set sampling.batch_size = 8 or less"):
        build_sharding(recipe, Ranks(0, 2))
    enough = {"train": recipe.train.model_dump(), "sampling": {"batch_size": 8}}
    assert build_sharding(Recipe.model_validate(enough), Ranks(0, 2)) is None
    with pytest.raises(RecipeError, match=r"problems_per_step = 5 is too few for 6 ranks"):
        build_sharding(recipe, Ranks(0, 6))
    assert build_sharding(recipe, SINGLE_PROCESS) is None


def test_sharding_needs_torchrun(tmp_path: Path) -> None:
    sharded = Recipe.model_validate({"distributed": {"shard": "full"}, "train": {"steps": 0}})
    with pytest.raises(RecipeError, match="needs torchrun"):
        run_to_end(sharded, tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(RecipeError, match=r"param_dtype and reduce_dtype need shard"):
        validate(Recipe, {"distributed": {"param_dtype": "bfloat16"}})


def test_other_commands_are_one_process(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("sys.argv", ["selfteach", "study", "recipe.toml"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2 and "without torchrun" in capsys.readouterr().err
    assert torchrun.is_main()


def test_errors_of_another_rank_name_it(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(console_script, "RANK_0_GRACE_S", 0.0)
    monkeypatch.setattr("sys.argv", ["selfteach", "train", "no_such.toml", "--out", "x"])
    with pytest.raises(SystemExit):
        cli.main()
    assert capsys.readouterr().err.startswith("selfteach: rank 1: ")
