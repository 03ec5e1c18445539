"""A recipe with an environment of `verifiers` is checked, trained on, resumed and evaluated."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from episode_model import save_model as save_model_with_tools
from same_run import assert_same
from tiny_models import save_model
from typer.testing import CliRunner
from verifiers_environments import CLASSIC, EPISODES, shaped_library

from selfteach.cli import app
from selfteach.errors import SelfteachError

pytestmark = pytest.mark.slow


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    save_model(tmp_path / "model")
    (tmp_path / "env.py").write_text(CLASSIC)
    (tmp_path / "recipe.toml").write_text(f'''
model = {{ path = "{tmp_path}/model" }}
data = {{ type = "verifiers", environment = "./env.py:load_environment" }}
objective = {{ type = "grpo" }}
sampling = {{ max_tokens = 8 }}
train = {{ steps = 2, problems_per_step = 2, group_size = 3, checkpoint_every = 1 }}
evaluation = {{ every = 2, validation_k = 1, test_k = 1 }}
reward = {{ functions = ["environment"], success = 1.0 }}
''')
    with shaped_library(tmp_path):
        yield tmp_path


def called(*words: object) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code in (0, 2), result.output
    return result.output


def test_an_environment_goes_through_the_commands(folder: Path) -> None:
    checked = called("check", folder / "recipe.toml")
    assert "rewards correct (weight 1), longer (weight 0.01)" in checked
    assert "data.environment: env.py:load_environment, source" in checked
    run = folder / "run"
    called("train", folder / "recipe.toml", "--out", run)
    lines = (run / "samples" / "step_000001.jsonl").read_text().splitlines()
    samples = [json.loads(line) for line in lines]
    assert list(samples[0]["rewards"]) == ["correct", "longer", "longest", "picky"]
    longest: dict[str, float] = {}
    for sample in samples:
        longest.setdefault(sample["problem_id"], 0)
        longest[sample["problem_id"]] += sample["rewards"]["longest"]
    assert len(longest) == 2 and min(longest.values()) >= 1, "one of each group at least"

    killed = folder / "killed"
    shutil.copytree(run, killed)  # as if killed before the first checkpoint, with all rewards there
    shutil.rmtree(killed / "checkpoints")
    (killed / "result.json").unlink()
    rows = (killed / "metrics.jsonl").read_text().splitlines(keepends=True)
    (killed / "metrics.jsonl").write_text(
        "".join(row for row in rows if json.loads(row)["step"] < 1)
    )
    called("resume", killed)
    for part in ("rewards", "samples"):
        for file in (run / part).iterdir():
            assert (killed / part / file.name).read_bytes() == file.read_bytes()
    assert "Avg@1" in called("evaluate", run, "--problems", "test", "-k", 1)
    selected = CliRunner().invoke(
        app, ["select", str(folder / "recipe.toml"), "--out", str(folder / "selected"),
              "--set", "select.critic=false"],
    )  # fmt: skip
    assert "files, which have no environment to reward them" in str(selected.exception)
    (killed / "result.json").unlink()
    (folder / "env.py").write_text(CLASSIC + "\n# changed\n")
    refused = CliRunner().invoke(app, ["resume", str(killed)])
    assert isinstance(refused.exception, SelfteachError)
    assert "data.environment" in str(refused.exception)


def episodes(folder: Path, name: str, steps: int = 2) -> Path:
    """Write a recipe that trains on episodes of an environment of several turns."""
    model = folder / "tools"
    if not model.exists():
        save_model_with_tools(model)
    (folder / "turns_env.py").write_text(EPISODES)
    path = folder / f"{name}.toml"
    path.write_text(f"""
model = {{ path = "{model}", thinking = {{ student = false }} }}
data.type = "verifiers"
data.environment = "./turns_env.py:{name}"
data.split = {{ validation = 2, test = 2 }}
environment = {{ type = "verifiers", max_turns = 3, success = 0.5 }}
objective = {{ type = "grpo" }}
sampling = {{ max_tokens = 8, batch_size = 6 }}
train = {{ steps = {steps}, problems_per_step = 2, group_size = 3, checkpoint_every = 1, threads = 1 }}
evaluation = {{ every = 2, validation_k = 1, test_k = 1 }}
""")
    return path


@pytest.mark.parametrize("name", ["guess_by_size", "sums_by_size"])
def test_episodes_go_through_the_commands(folder: Path, name: str) -> None:
    """Two steps; killed after the first they end in the same weights, with the rewards on disk."""
    recipe, run = episodes(folder, name), folder / "whole"
    checked = called("check", recipe)
    assert "6 episodes of one made-up turn were run" in checked
    called("train", recipe, "--out", run)
    lines = (run / "samples" / "step_000001.jsonl").read_text().splitlines()
    samples = [json.loads(line) for line in lines]
    assert len(samples) == 6 and all(sample["segments"] for sample in samples)
    rewards = ["size", "turns"] if name == "guess_by_size" else ["calls", "size"]
    assert all(list(sample["rewards"]) == rewards for sample in samples)
    rows = [json.loads(row) for row in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row["kind"] == "step"]
    assert len(steps) == 2 and f"rewards/{rewards[0]}/mean" in steps[0]
    if name == "guess_by_size":
        assert all(row["turns"] > 1 and row["event/observation"] > 0 for row in steps)
        (stored, *_) = sorted((run / "rollouts").glob("step_000001*.jsonl"))
        first = json.loads(stored.read_text().splitlines()[0])
        assert first["observation"] == "The number has 1 digit."

    killed = folder / "killed"
    shutil.copytree(run, killed)
    (killed / "result.json").unlink()
    shutil.rmtree(killed / "model", ignore_errors=True)
    for path in (killed / "checkpoints").glob("step_*2"):
        shutil.rmtree(path)
    before = [row for row in rows if row["step"] < 2]
    (killed / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in before))
    called("resume", killed)
    assert_same(run, killed)


def test_check_refuses_episodes_that_fail(folder: Path) -> None:
    for name, message in {
        "rewriting": "setup_state rewrites the prompt",
        "with_raising": "its reward raising failed for each of 6 made-up rollouts",
    }.items():
        result = CliRunner().invoke(app, ["check", str(episodes(folder, name))])
        assert message in str(result.exception) and "\n" not in str(result.exception)
