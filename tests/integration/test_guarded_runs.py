"""Runs that learn nothing stop and say so; a guard's lower rate survives a resume bit for bit."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from same_run import assert_same
from typer.testing import CliRunner

from selfteach.cli import app
from selfteach.config.recipe import Recipe
from selfteach.config.schema import merge, validate
from selfteach.errors import RunStopped
from selfteach.runtime.run_folder import RunFolder, load_result
from selfteach.trainer.loop import run_to_end, train

TINY = {
    "model": {"path": "lab:two_styles"},
    "data": {"type": "lab", "train": 12, "validation": 2, "test": 2},
    "sampling": {"max_tokens": 40},
    "critic": {"type": "oracle"},
    "context": {"type": "step_aligned"},
    "train": {
        "steps": 8, "problems_per_step": 2, "group_size": 4, "checkpoint_every": 4, "threads": 1,
    },
    "evaluation": {"every": 8, "validation_k": 1, "test_k": 1},
}  # fmt: skip
IDLE = {  # no rollout is whole, so none is right, and no group is mixed
    "sampling": {"max_tokens": 2}, "objective": {"type": "grpo"}, "critic": False,
    "context": {"type": "none"}, "guard": {"idle_steps": 3},
}  # fmt: skip
SETTINGS = (
    "sampling.max_tokens=2", 'objective.type="grpo"', "guard.idle_steps=3", "train.steps=4",
    "train.problems_per_step=2", "train.group_size=4", "data.train=12", "data.validation=2",
    "data.test=2", "evaluation.validation_k=1", "evaluation.test_k=1", "train.threads=1",
)  # fmt: skip


def recipe(**changes: object) -> Recipe:
    return validate(Recipe, merge(TINY, changes), where="test")


def test_a_run_that_learns_nothing_stops_and_can_go_on(tmp_path: Path) -> None:
    idle = recipe(**IDLE)
    for stops in (3, 6):  # a resume goes on for as many steps
        with pytest.raises(RunStopped, match=rf"step {stops} of 8: nothing could be learned in 3"):
            run_to_end(idle, tmp_path)
        assert max(row["step"] for row in RunFolder(tmp_path).metrics()) == stops
        assert not (tmp_path / "result.json").exists()
    run_to_end(idle, tmp_path)
    assert load_result(tmp_path)["step"] == 8
    sampled = [row["rollouts_sampled"] for row in RunFolder(tmp_path).metrics() if "loss" in row]
    assert len(sampled) == 8


def test_rounding_errors_of_a_teacher_that_agrees_train_nothing(tmp_path: Path) -> None:
    null = recipe(
        context={"type": "none"}, teacher={"type": "initial"},
        objective={"divergence": "forward_kl"}, guard={"idle_steps": 3},
    )  # fmt: skip
    with pytest.raises(RunStopped, match="the gradient is 0: the teacher says what"):
        run_to_end(null, tmp_path)
    norms = [row["grad_norm"] for row in RunFolder(tmp_path).metrics() if "grad_norm" in row]
    assert len(norms) == 3 and max(norms) < 1e-6


def command(folder: Path, *settings: str) -> tuple[int, str]:
    """Train by the command line; return what it exits with and prints."""
    path = folder / "recipe.toml"
    path.write_text('[model]\npath = "lab:two_styles"\n[data]\ntype = "lab"\n')
    words = ["train", str(path), "--out", str(folder / "run")]
    for setting in (*SETTINGS, *settings):
        words += ["--set", setting]
    result = CliRunner().invoke(app, words)
    message = str(result.exception) if isinstance(result.exception, RunStopped) else ""
    return result.exit_code, result.output + message


def test_the_command_says_why_as_it_arises_and_at_the_end(tmp_path: Path) -> None:
    code, output = command(tmp_path)
    assert code != 0
    assert "health: step 1: nothing could be learned: 100% of the rollouts were cut" in output
    assert "step    1 of 4  correct 0%" in output, "a line per step where output is redirected"
    assert "stopped after step 3 of 4: nothing could be learned in 3 steps" in output


def test_a_short_run_that_learned_nothing_is_no_success(tmp_path: Path) -> None:
    code, output = command(tmp_path, "train.steps=2")
    assert code != 0 and "is complete and has learned nothing" in output
    assert load_result(tmp_path / "run")["step"] == 2


def test_a_lower_rate_survives_a_resume(tmp_path: Path) -> None:
    lowered = recipe(guard={"truncated": 0.0, "action": "reduce_lr", "window": 2},
                     sampling={"max_tokens": 24})  # fmt: skip
    run_to_end(lowered, tmp_path / "whole")
    rates = [row["lr"] for row in RunFolder(tmp_path / "whole").metrics() if "lr" in row]
    assert rates == pytest.approx([1e-3 * 0.5 ** (step // 2) for step in range(8)])
    cut = tmp_path / "cut"
    rows = train(lowered, cut)
    while next(rows).get("step") != 6:
        pass
    rows.close()
    shutil.rmtree(cut / "model", ignore_errors=True)
    run_to_end(lowered, cut)
    assert_same(tmp_path / "whole", cut)


@pytest.mark.parametrize("way", ["adapters", "initial", "grpo"])
def test_the_kl_from_the_initial_policy_starts_at_0_and_stops_a_run(
    tmp_path: Path, way: str
) -> None:
    changes: dict = {
        "adapters": {"model": {"lora": {"rank": 4, "alpha": 8}}, "teacher": {"type": "live"}},
        "initial": {},
        "grpo": {"objective": {"type": "grpo", "kl_coef": 1e-6}, "critic": False,
                 "context": {"type": "none"}},
    }[way]  # fmt: skip
    watched = recipe(
        guard={"kl_initial": 1e-3, "action": "stop"}, optimizer={"lr": 1e-2}, **changes
    )
    with pytest.raises(RunStopped, match=r"kl_initial is .* above guard\.kl_initial = 0\.001"):
        run_to_end(watched, tmp_path)
    kl = [row["kl_initial"] for row in RunFolder(tmp_path).metrics() if "kl_initial" in row]
    assert kl[0] == pytest.approx(0.0, abs=1e-6) and kl[-1] > 1e-3


@pytest.mark.slow
def test_a_study_goes_on_with_the_other_runs(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(STUDY)
    result = CliRunner().invoke(app, ["study", str(path), "--out", str(tmp_path / "study")])
    assert isinstance(result.exception, RunStopped)
    assert "runs/grpo/seed_0 stopped after step 2" in str(result.exception)
    assert load_result(tmp_path / "study" / "runs" / "step_aligned" / "seed_0")["step"] == 3
    assert "health: grpo seed 0: step 1: nothing could be learned" in result.output


STUDY = """
[model]
path = "lab:two_styles"
[data]
type = "lab"
train = 8
validation = 2
test = 2
[train]
steps = 3
problems_per_step = 2
group_size = 4
[evaluation]
validation_k = 1
test_k = 1
[guard]
idle_steps = 2
[study]
title = "one arm learns nothing"
seeds = [0]
workers = 1
inspect_answers = 0
[arms.grpo]
objective = { type = "grpo" }
sampling = { max_tokens = 2 }
[arms.step_aligned]
critic = { type = "oracle" }
context = { type = "step_aligned" }
"""
