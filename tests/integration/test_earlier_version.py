"""A run folder written at commit 2885fa2, before recipe keys, metrics and folders were renamed."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from selfteach.analysis.run_data import read_run
from selfteach.commands.actions import load
from selfteach.config.recipe import Recipe
from selfteach.config.schema import validate
from selfteach.runtime.provenance import cpu_capability
from selfteach.runtime.run_folder import RunFolder
from selfteach.trainer.loop import run_to_end

RUNS = Path(__file__).parents[1] / "fixtures" / "run_folders"
STOPPED = RUNS / "2885fa2"
"""Stopped after step 3 of 4, its last checkpoint at step 2: step 3 is on disk and is trained again."""
END = RUNS / "2885fa2_end"
"""The end of the same run, uninterrupted, by the code of that commit."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copytree(STOPPED, tmp_path / "run")
    return tmp_path / "run"


def test_its_recipe_is_read_and_each_renamed_key_is_named_once(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "selfteach"):
        recipe = validate(Recipe, RunFolder(folder).config())
        RunFolder(folder).config()
    assert (recipe.train.group_size, recipe.train.num_iterations) == (4, 2)
    assert recipe.sampling.batch_size == 8 and recipe.context.fallback == "reference"
    assert recipe.objective.type == "hybrid"
    assert recipe.objective.distillation.train_on == "incorrect"
    assert recipe.objective.distillation.changed_steps_fraction == 0.5
    assert recipe.objective.grpo.scale_rewards == "group"
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == len(set(lines)) >= 10
    assert f"{folder / 'config.json'}: train.answers_per_problem is now train.group_size" in lines


def test_it_resumes_to_the_same_end_bit_for_bit(folder: Path) -> None:
    recipe = validate(Recipe, RunFolder(folder).config())
    made_on = json.loads((folder / "environment.json").read_text())["processor"]
    sampled = (folder / "answers" / "step_000003.000.jsonl").read_bytes()
    run_to_end(recipe, folder)
    ours = load_file(folder / "model" / "adapter_model.safetensors")
    theirs = load_file(END / "adapter_model.safetensors")
    assert ours.keys() == theirs.keys()
    # Another CPU's vector instructions round otherwise.
    tolerance = 0.0 if cpu_capability() == made_on else 1e-4
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=tolerance)
    assert (folder / "answers" / "step_000003.000.jsonl").read_bytes() == sampled
    assert not (folder / "rollouts").exists(), "new rollouts stand beside the old ones"
    if cpu_capability() == made_on:
        test = json.loads((folder / "evaluations" / "test_000004.json").read_text())
        assert test == json.loads((END / "test_000004.json").read_text())
        budget = json.loads((folder / "result.json").read_text())["budget"]
        before = json.loads((END / "result.json").read_text())["budget"]
        assert budget["rollouts_sampled"] == before["answers_sampled"] == 64
        assert budget["tokens_trained"] == before["tokens_trained"]


def test_its_metrics_have_today_s_names(folder: Path) -> None:
    steps = read_run(folder).of_kind("step")
    assert [row["step"] for row in steps] == [1, 2, 3]
    names = {"rollouts_sampled", "time/rollout", "time/critique", "time/train", "frac_in_loss"}
    assert all(names | {"eos_in_loss", "clip_fraction"} <= row.keys() for row in steps)
    assert not any("seconds_sampling" in row or "taught" in row for row in steps)


def test_its_report_opens(folder: Path) -> None:
    from selfteach.analysis.report.page import write_report

    page = write_report(folder).read_text(encoding="utf-8")
    assert "time/rollout" not in page.split("<body", 1)[0]
    assert len(page) > 10_000 and "Traceback" not in page


def test_an_old_recipe_file_is_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(
        '[data]\ntype = "lab"\nchance_below = 0.1\n[train]\nanswers_per_problem = 4\n'
        '[arms.grpo]\nobjective = { type = "grpo", normalise = "none", kl_weight = 0.1 }\n'
        '[arms.wrong]\ncontext = { type = "reference" }\nobjective = { gate = "wrong" }\n'
    )
    with caplog.at_level(logging.WARNING, "selfteach"):
        study = load(path, ["sampling.batch_answers=32"])
    grpo, wrong = study.recipe("grpo"), study.recipe("wrong")
    assert grpo.train.group_size == 4 and grpo.sampling.batch_size == 32
    assert grpo.objective.type == "grpo" and grpo.objective.scale_rewards == "none"
    assert grpo.objective.kl_coef == 0.1
    assert wrong.objective.type == "distillation" and wrong.objective.train_on == "incorrect"
    lines = [record.getMessage() for record in caplog.records]
    assert "objective.gate = 'wrong' is now objective.train_on = 'incorrect'" in " ".join(lines)
    assert len(lines) == 6
