"""Ranks that sample from one served engine: the run of one process, and its bad days."""

from __future__ import annotations

import json
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
    rows_seen,
)
from scripted_vllm import Vllm, serving

from selfteach.config.recipe import Recipe
from selfteach.config.schema import merge
from selfteach.errors import SelfteachError
from selfteach.rollout.vllm import vllm_engine
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
WAYS = {"whole": {}, "pieces": SHARDED, "lora": LORA, "lora_in_pieces": {**LORA, **SHARDED}}


@pytest.fixture(autouse=True, scope="module")
def _double() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vllm_engine, "PAUSE_S", 0.01)
        yield from in_double()


@pytest.fixture
def server(_double: None) -> Iterator[Vllm]:
    built = build(recipe(**merge(SMALL, {"train": {"steps": 0}})))
    with serving(built.components.policy.model, built.tokenizer) as server:  # type: ignore[arg-type]
        yield server


def served(server: Vllm, *changes: dict[str, Any], patience: float = 0.0) -> Recipe:
    values: dict[str, Any] = {
        "engine": {
            "type": "vllm_server", "url": server.url, "model": "tiny", "tolerance": 1e-3,
            "concurrency": 1, "patience_seconds": patience,
        }
    }  # fmt: skip
    for change in (SMALL, *changes):
        values = merge(values, change)
    return recipe(**values)


def answers(run: Path) -> dict[str, list[tuple[Any, ...]]]:
    said = {}
    for path in sorted((run / "rollouts").glob("*.jsonl")):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        said[path.stem] = [(tuple(row["token_ids"]), row["policy_version"]) for row in rows]
    return said


def assert_same_end(ours: Path, theirs: Path) -> None:
    assert answers(ours) == answers(theirs)
    assert_same_weights(ours, theirs)


def failed(recipe: Recipe, folder: Path) -> str:
    """How this rank ends, with the name of its error."""
    with pytest.raises(SelfteachError) as caught:
        run_to_end(recipe, folder)
    return str(caught.value)


@pytest.mark.parametrize(
    "way", [pytest.param(w, marks=[] if w == "pieces" else [pytest.mark.slow]) for w in WAYS]
)
def test_two_ranks_sample_what_one_process_samples(way: str, server: Vllm, tmp_path: Path) -> None:
    own = {key: value for key, value in WAYS[way].items() if key != "distributed"}
    run_to_end(served(server, own), tmp_path / "one")
    asked, loads = len(server.asked), server.loads
    server.restart()
    on_ranks(2, rows_seen, served(server, WAYS[way]), tmp_path / "two")
    assert server.loads - loads == loads == 3, "rank 0 alone hands weights over"
    # Of each version every rank asks once whether it is there.
    assert len(server.asked) - asked == asked + 3
    assert {v for rows in answers(tmp_path / "two").values() for *_, v in rows} == {0, 1, 2}
    assert_same_end(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
def test_a_server_that_dies_ends_all_ranks_with_its_message_and_any_number_goes_on(
    server: Vllm, tmp_path: Path
) -> None:
    run_to_end(served(server), tmp_path / "one")
    for ranks in (1, 2):
        server.restart()
        server.dies_after = 2 + 4 + 3  # an evaluation, a step, and most of the next
        folder = tmp_path / f"then_{ranks}"
        said = on_ranks(2, failed, served(server, SHARDED), folder)
        assert said[0] == said[1] and f"{server.url} is gone" in said[0], said
        assert [row["step"] for row in RunFolder(folder).metrics()] == [0, 1]
        server.dies_after = None
        server.restart()
        on_ranks(ranks, rows_seen, served(server, SHARDED), folder)
        assert_same_run(folder, tmp_path / "one", step=2)


@pytest.mark.slow
def test_a_server_that_starts_again_is_given_the_weights_by_one_rank(
    server: Vllm, tmp_path: Path
) -> None:
    run_to_end(served(server), tmp_path / "one")
    loads = server.loads
    server.restart()
    server.restarts_after = 2 + 4 + 2
    on_ranks(2, rows_seen, served(server, patience=30.0), tmp_path / "two")
    assert server.loads - loads == loads + 1
    assert_same_end(tmp_path / "two", tmp_path / "one")


def test_a_server_that_keeps_its_old_weights_ends_all_ranks(server: Vllm, tmp_path: Path) -> None:
    server.stale = True
    said = on_ranks(2, failed, served(server, SHARDED), tmp_path)
    assert all("is stale: it still has the weights before" in message for message in said), said
    assert [row["step"] for row in RunFolder(tmp_path).metrics() if row["kind"] == "step"] == []


def test_who_is_not_there_is_said_by_all_ranks_before_anything_is_loaded(
    server: Vllm, tmp_path: Path
) -> None:
    server.stop()
    said = on_ranks(2, failed, served(server), tmp_path)
    assert said[0] == said[1] and "nobody answers at" in said[0]


def test_in_process_vllm_is_for_one(tmp_path: Path) -> None:
    alone = recipe(**merge(SMALL, {"engine": {"type": "vllm"}}))
    for message in on_ranks(2, failed, alone, tmp_path):
        assert 'serve the model (engine.type = "vllm_server")' in message
