"""Ranks whose steps overlap: the answers and the end of one process, killed, told to end, taken up."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from on_ranks import on_ranks
from runs_on_ranks import (
    SHARDED,
    assert_same_run,
    assert_same_weights,
    in_double,
    recipe,
    rows_seen,
    until_a_rank_ends,
    until_told_to_end,
)
from safetensors.torch import load_file
from scripted_critic import oracle_critique
from scripted_server import Server, refuses, says, serving

from selfteach.config.recipe import Recipe
from selfteach.config.schema import merge
from selfteach.errors import SelfteachError
from selfteach.runtime.run_folder import RunFolder, result_of
from selfteach.trainer.loop import run_to_end

LATE: dict[str, Any] = {
    "sampling": {"separate_copy": True},
    "objective": {"importance_cap": 2.0},
    "train": {"staleness": 2},
}
WAYS: dict[str, dict[str, Any]] = {
    "beside": {},
    "beside_in_pieces": SHARDED,
    "between_updates": {"sampling": {"separate_copy": False}},
}


@pytest.fixture(autouse=True, scope="module")
def _double() -> Iterator[None]:
    yield from in_double()


@pytest.fixture(scope="module")
def critic() -> Iterator[Server]:
    """Elsewhere, so that marking overlaps."""
    with serving(says(oracle_critique)) as server:
        yield server


@pytest.fixture(scope="module")
def late(critic: Server) -> Callable[..., Recipe]:
    """A recipe whose replies are kept in a folder, so that every run pays for its own."""

    def in_folder(folder: Path, change: dict[str, Any] | None = None) -> Recipe:
        asked = {
            "type": "endpoint", "base_url": critic.url, "model": "oracle", "max_tokens": 64,
            "reply_cache": str(folder / "replies.sqlite"), "min_similarity": 0.0, "http_retries": 0,
        }  # fmt: skip
        return recipe(**merge(merge(LATE, {"critic": asked}), change or {}))

    return in_folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, late: Callable[..., Recipe]) -> Path:
    """Overlapped, in one process."""
    folder = tmp_path_factory.mktemp("alone")
    run_to_end(late(folder), folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory, late: Callable[..., Recipe]) -> Path:
    """Overlapped, on two ranks that nobody stopped."""
    folder = tmp_path_factory.mktemp("both")
    on_ranks(2, rows_seen, late(folder, SHARDED), folder / "run")
    return folder / "run"


def answers(run: Path) -> dict[str, list[Any]]:
    said = {}
    for path in sorted((run / "rollouts").glob("*.jsonl")):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        said[path.stem] = [(row["token_ids"], row["policy_version"]) for row in rows]
    return said


def assert_same_bits(ours: Path, theirs: Path) -> None:
    a, b = (load_file(run / "model" / "model.safetensors") for run in (ours, theirs))
    assert all(torch.equal(a[name], value) for name, value in b.items())


@pytest.mark.parametrize(
    "way", [pytest.param(w, marks=[] if w == "beside" else [pytest.mark.slow]) for w in WAYS]
)
def test_two_ranks_overlap_as_one_process_does(
    way: str, alone: Path, late: Callable[..., Recipe], critic: Server, tmp_path: Path
) -> None:
    paid = len(critic.requests)
    rows, others = on_ranks(2, rows_seen, late(tmp_path, WAYS[way]), tmp_path / "run")
    asked = result_of(tmp_path / "run")["budget"]["critic_requests"]
    assert len(critic.requests) - paid == asked, "each answer is marked once"
    assert others == [] and all(row["ranks"] == 2 for row in rows if row["kind"] == "step")
    assert answers(tmp_path / "run") == answers(alone)
    versions = {name: {v for _, v in said} for name, said in answers(alone).items()}
    assert [versions[f"step_{step:06d}.000"] for step in (1, 2, 3, 4)] == [{0}, {0}, {0}, {1}]
    assert_same_run(tmp_path / "run", alone)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_rank_that_dies_costs_nothing_that_is_paid(
    ranks: int, alone: Path, both: Path, late: Callable[..., Recipe], critic: Server, tmp_path: Path
) -> None:
    cut = late(tmp_path, SHARDED)
    message, nothing = on_ranks(2, until_a_rank_ends, cut, tmp_path / "run")
    assert "rank 0: another rank has ended" in message and nothing is None
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "run/answers").iterdir()}
    assert len(written) == 2 + 4 * 2, "an evaluation, and all steps' answers: two are ahead"
    on_ranks(ranks, rows_seen, cut, tmp_path / "run")
    assert all(path.stat().st_mtime_ns == when for path, when in written.items())
    assert answers(tmp_path / "run") == answers(alone)
    assert_same_weights(tmp_path / "run", alone)
    if ranks == 2:
        assert_same_bits(tmp_path / "run", both)


@pytest.mark.slow
def test_sigterm_to_one_rank_ends_all_with_steps_under_way(
    both: Path, late: Callable[..., Recipe], tmp_path: Path
) -> None:
    rare = late(tmp_path, merge(SHARDED, {"train": {"checkpoint_every": 4}}))
    assert on_ranks(2, until_told_to_end, rare, tmp_path / "run") == ["ended", "ended"]
    run = tmp_path / "run"
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_000002"]
    # The weights that answered step 4 are no more. Without the second rank's share nobody goes on.
    without = shutil.copytree(run, tmp_path / "without")
    (without / "rollouts" / "step_000004.001.jsonl").unlink()
    said = on_ranks(2, failed, rare, without)
    assert said[0] == said[1] and "step_000004.001.jsonl is missing" in said[0], said
    rows, _ = on_ranks(2, rows_seen, rare, run)
    assert [row["step"] for row in rows if row["kind"] == "step"] == [3, 4]
    assert_same_bits(run, both)


def test_a_critic_that_fails_ends_all_ranks_with_its_message(
    late: Callable[..., Recipe], critic: Server, tmp_path: Path
) -> None:
    whole, critic.behaviours = critic.behaviours, [says(oracle_critique)] * 15 + [refuses(401)]
    try:
        said = on_ranks(2, failed, late(tmp_path, SHARDED), tmp_path / "run")
    finally:
        critic.behaviours = whole
    assert all("critic" in message and "another rank" not in message for message in said), said


def failed(recipe: Recipe, folder: Path) -> str:
    with pytest.raises(SelfteachError) as caught:
        run_to_end(recipe, folder)
    return str(caught.value)


def test_the_rows_say_how_the_steps_overlapped(both: Path) -> None:
    for row in RunFolder(both).metrics():
        if row["kind"] == "step":
            assert row["ranks"] == 2 and 0 <= row["overlap"] <= 1
