"""A recipe with an environment of `verifiers` is checked, trained on, resumed and evaluated."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_models import save_model
from typer.testing import CliRunner
from verifiers_environments import CLASSIC, shaped_library

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
