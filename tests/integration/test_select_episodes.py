"""`selfteach select` with an environment: rollouts are episodes, and its set can be trained on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import exit_status
from episode_model import save_model
from forked import kill_when

from selfteach.commands.select import selection
from selfteach.config.data_section import SelectConfig
from selfteach.config.recipe import Recipe
from selfteach.config.schema import merge, validate
from selfteach.errors import RecipeError

RECIPE = """
[model]
path = "{model}"
thinking = {{ student = false, teacher = false }}
[environment]
type = "calculator"
max_turns = 3
[sampling]
max_tokens = 12
batch_size = 4
[context]
type = "step_aligned"
[critic]
type = "oracle"
"""
CHOSEN = """
[data]
type = "chain_sums"
train = 6
validation = 2
test = 2
[select]
samples = 2
min_format_rate = 0.0
split = { train = 3, validation = 1, test = 1 }
"""
TRAINING = """
[train]
steps = 1
problems_per_step = 2
group_size = 2
threads = 1
[evaluation]
validation_k = 1
test_k = 1
"""
SECTION = {"type": "verifiers", "environment": "./turns_env.py:guess"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = save_model(tmp_path / "model")
    (tmp_path / "recipe.toml").write_text(RECIPE.format(model=model) + CHOSEN)
    return tmp_path


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_problems_are_selected_by_episodes_and_trained_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the middle, it goes on from the episodes and critiques on disk."""
    out, whole = folder / "out", folder / "whole"
    first = out / "samples" / "step_000000.jsonl"
    kill_when(
        first.exists, exit_status, monkeypatch, "select", folder / "recipe.toml", "--out", out
    )
    assert not (out / "card.json").exists()
    on_disk = {path: path.stat().st_mtime_ns for path in out.glob("rollouts/*.jsonl")}
    assert on_disk and exit_status(monkeypatch, "resume", out) == 0
    assert {path: path.stat().st_mtime_ns for path in on_disk} == on_disk
    assert exit_status(monkeypatch, "select", folder / "recipe.toml", "--out", whole) == 0
    for name in ("train.jsonl", "validation.jsonl", "test.jsonl", "card.json", "README.md"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()

    sampled = [row for path in sorted(out.glob("rollouts/*.jsonl")) for row in rows(path)]
    assert len(sampled) == 12 and all(row["segments"] for row in sampled)
    critiqued = [row for path in sorted(out.glob("samples/*.jsonl")) for row in rows(path)]
    assert len(critiqued) == 6 and all(row["critique"]["steps"] for row in critiqued)
    card = selection.card_of(out)
    assert (card["in"], card["kept"], card["answers"], card["critiques"]) == (6, 6, 12, 6)
    assert card["environment"] == {"type": "calculator", "max_turns": 3}

    text = (out / "README.md").read_text().split("```toml\n")[1].split("```")[0]
    assert '[environment]\ntype = "calculator"\nmax_turns = 3' in text
    shared = RECIPE.format(model=folder / "model").replace(
        '[environment]\ntype = "calculator"\nmax_turns = 3\n', ""
    )
    (out / "training.toml").write_text(shared + text + TRAINING)
    monkeypatch.chdir(out)
    assert exit_status(monkeypatch, "train", "training.toml", "--out", folder / "run") == 0
    (samples,) = (folder / "run" / "samples").glob("*.jsonl")
    assert all(row["segments"] and row["critique"]["steps"] for row in rows(samples))
    config = json.loads((folder / "run" / "config.json").read_text())
    assert "turns_chain_sums" in json.dumps(config)


@pytest.mark.parametrize(
    ("changes", "chosen", "message"),
    [
        ({}, {"critic_test": "solution"}, "without its tools and replies"),
        (
            {"data": SECTION, "environment": {"type": "verifiers"}, "critic": None,
             "context": {"type": "none"}, "objective": {"type": "grpo"}},
            {"critic": False},
            "files, which have no environment to run episodes",
        ),
    ],
)  # fmt: skip
def test_what_cannot_hold_for_episodes_is_one_line(
    tmp_path: Path, changes: dict, chosen: dict, message: str
) -> None:
    values = {
        "model": {"path": "tiny"}, "environment": {"type": "calculator"},
        "data": {"type": "chain_sums"}, "critic": {"type": "oracle"},
        "context": {"type": "step_aligned"},
    }  # fmt: skip
    recipe = validate(Recipe, merge(values, changes) if "data" not in changes else changes | {
        "model": {"path": "tiny"}
    }, where="test")  # fmt: skip
    with pytest.raises(RecipeError, match=message) as caught:
        list(selection.select(recipe, SelectConfig.model_validate(chosen), tmp_path / "out"))
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()
