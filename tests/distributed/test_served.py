"""Ranks that sample from one served engine: the run of one process, and failures of the server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from on_ranks import on_ranks
from runs_on_ranks import (
    SHARDED,
    assert_same_run,
    assert_same_weights,
    in_double,
    recipe,
    rollouts_of,
    train_rows,
)
from scripted_vllm import ScriptedVllm, serving, serving_fleet

from selfteach.config.recipe import Recipe
from selfteach.config.schema import merge
from selfteach.errors import SelfteachError
from selfteach.rollout.vllm import restart_watch, vllm_engine, vllm_fleet
from selfteach.runtime.run_folder import RunFolder
from selfteach.trainer.build import build
from selfteach.trainer.loop import run_to_end

SMALL = {
    "model": {"path": "lab:two_styles"},
    "data": {"train": 6, "validation": 2, "test": 2},
    "sampling": {"max_tokens": 8, "batch_size": 2},
    "train": {"steps": 2, "problems_per_step": 2, "checkpoint_every": 1, "max_length": 96},
    "evaluation": {"every": 2, "validation_k": 1, "test_k": 1},
    "distributed": {"timeout_seconds": 60},
}
LORA = {"model": {"lora": {"rank": 2, "alpha": 4.0}}, "teacher": {"type": "initial"}}
VARIANTS = {"replicated": {}, "sharded": SHARDED, "lora": LORA, "lora_sharded": {**LORA, **SHARDED}}


@pytest.fixture(autouse=True, scope="module")
def _double() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vllm_engine, "RETRY_INTERVAL_S", 0.01)
        patch.setattr(vllm_fleet, "RESTORE_INTERVAL_S", 0.02)
        patch.setattr(restart_watch, "WATCH_INTERVAL_S", 0.05)
        yield from in_double()


@pytest.fixture
def server(_double: None) -> Iterator[ScriptedVllm]:
    built = build(recipe(**merge(SMALL, {"train": {"steps": 0}})))
    with serving(built.components.policy.model, built.tokenizer) as server:  # type: ignore[arg-type]
        yield server


def served(server: ScriptedVllm, *changes: dict[str, Any], patience: float = 0.0) -> Recipe:
    values: dict[str, Any] = {
        "engine": {
            "type": "vllm_server", "url": server.url, "model": "tiny", "tolerance": 1e-3,
            "concurrency": 1, "patience_seconds": patience,
        }
    }  # fmt: skip
    for change in (SMALL, *changes):
        values = merge(values, change)
    return recipe(**values)


def assert_same_result(ours: Path, theirs: Path) -> None:
    assert rollouts_of(ours) == rollouts_of(theirs)
    assert_same_weights(ours, theirs)


def failed(recipe: Recipe, folder: Path) -> str:
    """Return the error of this rank."""
    with pytest.raises(SelfteachError) as caught:
        run_to_end(recipe, folder)
    return str(caught.value)


@pytest.mark.parametrize(
    "variant",
    [pytest.param(w, marks=[] if w == "sharded" else [pytest.mark.slow]) for w in VARIANTS],
)
def test_two_ranks_sample_what_one_process_samples(
    variant: str, server: ScriptedVllm, tmp_path: Path
) -> None:
    unsharded = {key: value for key, value in VARIANTS[variant].items() if key != "distributed"}
    run_to_end(served(server, unsharded), tmp_path / "one")
    requests, loads = len(server.requests), server.loads
    server.restart()
    on_ranks(2, train_rows, served(server, VARIANTS[variant]), tmp_path / "two")
    assert server.loads - loads == loads == 3, "only rank 0 sends weights"
    # Every rank runs the weight check once per version.
    assert len(server.requests) - requests == requests + 3
    assert {v for rows in rollouts_of(tmp_path / "two").values() for *_, v in rows} == {0, 1, 2}
    assert_same_result(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
def test_a_server_that_dies_ends_all_ranks_with_its_message_and_any_number_resumes(
    server: ScriptedVllm, tmp_path: Path
) -> None:
    run_to_end(served(server), tmp_path / "one")
    for ranks in (1, 2):
        server.restart()
        server.dies_after = 2 + 4 + 3  # an evaluation, a step, and most of the next
        folder = tmp_path / f"then_{ranks}"
        errors = on_ranks(2, failed, served(server, SHARDED), folder)
        assert errors[0] == errors[1] and f"{server.url} is unavailable" in errors[0], errors
        assert [row["step"] for row in RunFolder(folder).metrics()] == [0, 1]
        server.dies_after = None
        server.restart()
        on_ranks(ranks, train_rows, served(server, SHARDED), folder)
        assert_same_run(folder, tmp_path / "one", step=2)


@pytest.mark.slow
@pytest.mark.parametrize("in_memory", [False, True])
def test_a_restarted_server_gets_the_weights_from_one_rank(
    server: ScriptedVllm, tmp_path: Path, in_memory: bool
) -> None:
    run_to_end(served(server), tmp_path / "one")
    loads = server.loads
    server.restart()
    server.extension = in_memory
    server.restarts_after = 2 + 4 + 2
    on_ranks(2, train_rows, served(server, patience=30.0), tmp_path / "two")
    assert server.loads - loads == loads + 1
    assert_same_result(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
@pytest.mark.parametrize("in_memory", [False, True])
def test_two_ranks_sample_from_a_fleet_of_which_one_is_restarted_and_one_ends(
    server: ScriptedVllm, tmp_path: Path, in_memory: bool
) -> None:
    """Either rank may notice the restart; in memory only rank 0 has the weights."""
    run_to_end(served(server), tmp_path / "one")
    server.restart()
    with serving_fleet(server.model, server._tokenizer, 3) as fleet:
        for member in fleet:
            member.extension = in_memory
        fleet[1].restarts_after, fleet[2].dies_after = 2, 1
        values = served(server, patience=30.0).model_dump(mode="json")
        del values["engine"]["url"]
        values["engine"]["urls"] = [member.url for member in fleet]
        on_ranks(2, train_rows, recipe(**values), tmp_path / "two")
        assert fleet[1].restarts_after is None and fleet[2].dies_after == 0
        assert all(member.rpcs for member in fleet) == in_memory
    assert_same_result(tmp_path / "two", tmp_path / "one")


def test_a_server_that_keeps_its_old_weights_ends_all_ranks(
    server: ScriptedVllm, tmp_path: Path
) -> None:
    server.stale = True
    errors = on_ranks(2, failed, served(server, SHARDED), tmp_path)
    assert all("is stale: it still has the weights before" in message for message in errors), errors
    assert [row["step"] for row in RunFolder(tmp_path).metrics() if row["kind"] == "step"] == []


def test_a_missing_server_ends_all_ranks_before_a_model_is_loaded(
    server: ScriptedVllm, tmp_path: Path
) -> None:
    server.stop()
    errors = on_ranks(2, failed, served(server), tmp_path)
    assert errors[0] == errors[1] and "no server replies at" in errors[0]


def test_in_process_vllm_is_for_one_process(tmp_path: Path) -> None:
    in_process = recipe(**merge(SMALL, {"engine": {"type": "vllm"}}))
    for message in on_ranks(2, failed, in_process, tmp_path):
        assert 'serve the model (engine.type = "vllm_server")' in message
