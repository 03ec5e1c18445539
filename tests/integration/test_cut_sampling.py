"""Runs that sample from a cut distribution, and evaluate greedily: what they sample and log."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from selfteach.commands.evaluate import evaluate_model
from selfteach.config.recipe import Recipe
from selfteach.errors import RecipeError
from selfteach.evaluation.evaluation_record import load_evaluation
from selfteach.models.sequences import sequences
from selfteach.runtime.run_folder import RunFolder
from selfteach.trainer.build import build
from selfteach.trainer.loop import run_to_end

VALUES = {
    "model": {"path": "lab:two_styles"},
    "data": {"type": "lab", "train": 6, "validation": 6, "test": 6},
    "sampling": {"max_tokens": 40, "top_k": 2, "top_p": 0.95},
    "critic": {"type": "oracle"},
    "context": {"type": "step_aligned"},
    "train": {"steps": 1, "problems_per_step": 3, "group_size": 4, "threads": 1},
    "evaluation": {"validation_k": 1, "test_k": 1, "temperature": 0.0},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cut") / "run"
    run_to_end(Recipe.model_validate(VALUES), path)
    return path


def rollouts(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def built():
    return build(Recipe.model_validate(VALUES))


def logits(built, row: dict) -> torch.Tensor:
    side = sequences([row["prompt_ids"]], [row["token_ids"]], built.components.pad_id)
    with torch.no_grad():
        return built.components.policy.score(side).logits(slice(None))


def test_rollouts_hold_likely_tokens_with_their_cut_probabilities(folder: Path, built) -> None:
    second = 0
    for row in rollouts(folder / "rollouts/step_000001.000.jsonl"):
        logits_TV, ids = logits(built, row), torch.tensor(row["token_ids"])
        top = logits_TV.topk(2)
        logp = top.values.log_softmax(-1)
        place = (top.indices == ids[:, None]).int()
        assert place.any(1).all(), "one of the two likeliest tokens"
        alone = logp[:, 0].exp() >= 0.95
        want = torch.where(alone, 0.0, logp.gather(1, place.argmax(1)[:, None])[:, 0])
        torch.testing.assert_close(torch.tensor(row["logps"]), want, rtol=0, atol=1e-4)
        second += int(place[:, 1].sum())
    assert second > 0, "not greedy"


def test_the_engine_is_not_compared_with_the_trainer_by_other_distributions(folder: Path) -> None:
    (row,) = [row for row in RunFolder(folder).metrics() if row["kind"] == "step"]
    assert not [name for name in row if name.startswith("mismatch")]
    assert row["loss"] > 0


def test_a_greedy_evaluation_takes_the_likeliest_tokens(folder: Path, built) -> None:
    rows = rollouts(folder / "rollouts/validation_000000.000.jsonl")
    assert len(rows) == 6
    for row in rows:
        assert logits(built, row).argmax(-1).tolist() == row["token_ids"]
    assert load_evaluation(folder, "test", 1).k == 1


def test_greedy_rollouts_are_not_sampled_several_times(folder: Path) -> None:
    with pytest.raises(RecipeError, match=r"k = 4: evaluation\.temperature = 0 is greedy"):
        evaluate_model(folder, k=4)
    assert evaluate_model(folder)["k"] == 1
