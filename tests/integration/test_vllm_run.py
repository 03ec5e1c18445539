"""Whole runs that sample from a served engine: what it costs when it dies, and when it is stale."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from same_run import assert_same, step_rows
from scripted_vllm import ScriptedVllm, serving

from selfteach import cli
from selfteach.config.recipe import Recipe
from selfteach.config.schema import merge, validate
from selfteach.errors import EngineError
from selfteach.trainer.build import build
from selfteach.trainer.loop import run_to_end

RUN: dict[str, Any] = {
    "model": {"path": "lab:two_styles"},
    "data": {"type": "lab", "train": 4, "validation": 1, "test": 1},
    "sampling": {"max_tokens": 8, "batch_size": 4},
    "context": {"type": "reference"},
    "objective": {"importance_cap": 1.0},
    "train": {
        "steps": 2, "problems_per_step": 2, "group_size": 2, "threads": 1,
        "checkpoint_every": 1, "max_length": 96,
    },
    "evaluation": {"every": 2, "validation_k": 1, "test": False},
}  # fmt: skip


@pytest.fixture
def server() -> Iterator[ScriptedVllm]:
    built = build(validate(Recipe, merge(RUN, {"train": {"steps": 0}})))
    model = built.components.policy.model
    with serving(model, built.tokenizer) as server:  # type: ignore[arg-type]
        yield server


def recipe(server: ScriptedVllm) -> Recipe:
    engine = {
        "type": "vllm_server", "url": server.url, "model": "tiny", "tolerance": 1e-3,
        "concurrency": 1, "patience_seconds": 0.0,
    }  # fmt: skip
    return validate(Recipe, merge(RUN, {"engine": engine}), where="test")


def command(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    """Run the console script in this process; its exit status."""
    monkeypatch.setattr("sys.argv", ["selfteach", *map(str, words)])
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def answers(run: Path) -> dict[str, list[dict[str, Any]]]:
    paths = sorted((run / "rollouts").glob("*.jsonl"))
    return {p.stem: [json.loads(line) for line in p.read_text().splitlines()] for p in paths}


def test_a_run_samples_and_evaluates_with_the_weights_of_each_step(
    server: ScriptedVllm, tmp_path: Path
) -> None:
    run_to_end(recipe(server), tmp_path / "run")
    rollouts = answers(tmp_path / "run")
    versions = {name: {row["policy_version"] for row in rows} for name, rows in rollouts.items()}
    assert versions == {
        "step_000001.000": {0}, "step_000002.000": {1},
        "validation_000000.000": {0}, "validation_000002.000": {2},
    }  # fmt: skip
    for row in step_rows(tmp_path / "run"):
        assert 0 <= row["mismatch_mean"] <= row["mismatch_max"] < 1e-4
        assert -1e-7 <= row["mismatch_kl"] < 1e-6
        # At a cap of 1 those ratios are truncated that are 1, or that rounding has put above it.
        assert 0 < row["importance_ratio_capped"] <= 1


def test_a_served_engine_samples_while_the_trainer_trains(
    server: ScriptedVllm, tmp_path: Path
) -> None:
    later = {"train": {"steps": 4, "staleness": 1}, "data": {"train": 8}}
    stale = validate(Recipe, merge(recipe(server).model_dump(), later))
    assert (
        build(stale).components.samples_in_background
        and not build(recipe(server)).components.samples_in_background
    )
    for name in ("run", "again"):
        run_to_end(stale, tmp_path / name)
        server.restart()
    rollouts = answers(tmp_path / "run")
    versions = [
        {row["policy_version"] for row in rollouts[f"step_{t:06d}.000"]} for t in (1, 2, 3, 4)
    ]
    assert versions == [{0}, {0}, {1}, {2}]
    assert rollouts == answers(tmp_path / "again")
    assert_same(tmp_path / "run", tmp_path / "again")


def test_a_stale_engine_ends_the_run_before_anything_is_trained_on_it(
    server: ScriptedVllm, tmp_path: Path
) -> None:
    wanted = tmp_path / "wanted"
    run_to_end(recipe(server), wanted)
    server.restart()
    # The first weights of the run are those the server has; the update after step 1 gets lost.
    server.stale = True
    with pytest.raises(EngineError, match="is stale: it still has the weights before"):
        run_to_end(recipe(server), tmp_path / "run")
    assert step_rows(tmp_path / "run") == []
    assert set(answers(tmp_path / "run")) == {"step_000001.000", "validation_000000.000"}
    server.stale = False
    server.restart()
    run_to_end(recipe(server), tmp_path / "run")
    assert_same(tmp_path / "run", wanted)


def test_an_engine_that_dies_is_said_in_one_line_and_resume_goes_on(
    server: ScriptedVllm,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wanted, run = tmp_path / "wanted", tmp_path / "run"
    run_to_end(recipe(server), wanted)
    server.restart()
    server.dies_after = 1 + 4 + 3  # an evaluation, a step, and most of the next
    with pytest.raises(EngineError, match="is unavailable"):
        run_to_end(recipe(server), run)
    assert [row["step"] for row in step_rows(run)] == [1]
    capsys.readouterr()
    assert command(monkeypatch, "resume", run) == 2
    error = capsys.readouterr().err.strip()
    assert "no server replies at http://127.0.0.1" in error and "\n" not in error
    server.dies_after = None
    server.restart()
    assert command(monkeypatch, "resume", run) == 0
    assert_same(run, wanted)
    assert answers(run) == answers(wanted)


def test_check_asks_the_engine_once(
    server: ScriptedVllm,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(
        f'[engine]\ntype = "vllm_server"\nurl = "{server.url}"\nmodel = "tiny"\n'
        '[arms.grpo]\nobjective = { type = "grpo" }\n'
        '[arms.more]\nobjective = { type = "grpo", kl_coef = 0.1 }\n'
    )
    small = ["--set", "data.train=4", "--set", "data.validation=1", "--set", "data.test=1"]
    assert command(monkeypatch, "check", path, *small) == 0
    assert server.loads == 0
    server.developer = False
    capsys.readouterr()
    assert command(monkeypatch, "check", path, *small) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and "VLLM_SERVER_DEV_MODE=1" in err
