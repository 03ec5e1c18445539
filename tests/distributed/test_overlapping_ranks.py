"""Ranks with overlapping steps: the rollouts and result of one process, also when killed."""

from __future__ import annotations

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
    rollouts_of,
    run_until_a_rank_dies,
    run_until_sigterm,
    train_rows,
)
from safetensors.torch import load_file
from scripted_critic import oracle_critique
from scripted_server import Server, refuses, says, serving

from selfteach.config.recipe import Recipe
from selfteach.config.schema import merge
from selfteach.errors import SelfteachError
from selfteach.runtime.run_folder import RunFolder, load_result
from selfteach.trainer.loop import run_to_end

STALE: dict[str, Any] = {
    "sampling": {"separate_copy": True},
    "objective": {"importance_cap": 2.0},
    "train": {"staleness": 2},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "separate_copy": {},
    "separate_copy_sharded": SHARDED,
    "between_updates": {"sampling": {"separate_copy": False}},
}


@pytest.fixture(autouse=True, scope="module")
def _double() -> Iterator[None]:
    yield from in_double()


@pytest.fixture(scope="module")
def critic() -> Iterator[Server]:
    """A critic behind an endpoint, so that critiques overlap with training."""
    with serving(says(oracle_critique)) as server:
        yield server


@pytest.fixture(scope="module")
def stale_recipe(critic: Server) -> Callable[..., Recipe]:
    """A recipe whose reply cache is in the run's folder, so that every run makes its own requests."""

    def in_folder(folder: Path, change: dict[str, Any] | None = None) -> Recipe:
        section = {
            "type": "endpoint", "base_url": critic.url, "model": "oracle", "max_tokens": 64,
            "reply_cache": str(folder / "replies.sqlite"), "min_similarity": 0.0, "http_retries": 0,
        }  # fmt: skip
        return recipe(**merge(merge(STALE, {"critic": section}), change or {}))

    return in_folder


@pytest.fixture(scope="module")
def single_run(
    tmp_path_factory: pytest.TempPathFactory, stale_recipe: Callable[..., Recipe]
) -> Path:
    """An asynchronous run in one process."""
    folder = tmp_path_factory.mktemp("single_run")
    run_to_end(stale_recipe(folder), folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def two_rank_run(
    tmp_path_factory: pytest.TempPathFactory, stale_recipe: Callable[..., Recipe]
) -> Path:
    """An asynchronous run on two ranks that was never stopped."""
    folder = tmp_path_factory.mktemp("two_rank_run")
    on_ranks(2, train_rows, stale_recipe(folder, SHARDED), folder / "run")
    return folder / "run"


def assert_same_bits(ours: Path, theirs: Path) -> None:
    a, b = (load_file(run / "model" / "model.safetensors") for run in (ours, theirs))
    assert all(torch.equal(a[name], value) for name, value in b.items())


@pytest.mark.parametrize(
    "variant",
    [pytest.param(w, marks=[] if w == "separate_copy" else [pytest.mark.slow]) for w in VARIANTS],
)
def test_two_ranks_overlap_like_one_process(
    variant: str,
    single_run: Path,
    stale_recipe: Callable[..., Recipe],
    critic: Server,
    tmp_path: Path,
) -> None:
    requests_before = len(critic.requests)
    rows, others = on_ranks(
        2, train_rows, stale_recipe(tmp_path, VARIANTS[variant]), tmp_path / "run"
    )
    requests = load_result(tmp_path / "run")["budget"]["critic_requests"]
    assert len(critic.requests) - requests_before == requests, "one request per rollout"
    steps = [row for row in rows if row["kind"] == "step"]
    assert others == [] and all(row["ranks"] == 2 for row in steps)
    assert all(0 <= row["overlap"] <= 1 for row in steps) or variant == "between_updates"
    assert rollouts_of(tmp_path / "run") == rollouts_of(single_run)
    versions = {name: {v for _, v in rows} for name, rows in rollouts_of(single_run).items()}
    assert [versions[f"step_{step:06d}.000"] for step in (1, 2, 3, 4)] == [{0}, {0}, {0}, {1}]
    assert_same_run(tmp_path / "run", single_run)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_rollouts_survive_the_death_of_a_rank(
    ranks: int,
    single_run: Path,
    two_rank_run: Path,
    stale_recipe: Callable[..., Recipe],
    critic: Server,
    tmp_path: Path,
) -> None:
    sharded = stale_recipe(tmp_path, SHARDED)
    message, no_result = on_ranks(2, run_until_a_rank_dies, sharded, tmp_path / "run")
    assert "rank 0: another rank has ended" in message and no_result is None
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "run/rollouts").iterdir()}
    assert len(written) == 2 + 4 * 2, "an evaluation, and the rollouts of all steps: two are ahead"
    on_ranks(ranks, train_rows, sharded, tmp_path / "run")
    assert all(path.stat().st_mtime_ns == when for path, when in written.items())
    assert rollouts_of(tmp_path / "run") == rollouts_of(single_run)
    assert_same_weights(tmp_path / "run", single_run)
    if ranks == 2:
        assert_same_bits(tmp_path / "run", two_rank_run)


@pytest.mark.slow
def test_sigterm_to_one_rank_ends_all_with_steps_in_flight(
    two_rank_run: Path, stale_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    rarely_saved = stale_recipe(tmp_path, merge(SHARDED, {"train": {"checkpoint_every": 4}}))
    assert on_ranks(2, run_until_sigterm, rarely_saved, tmp_path / "run") == ["ended", "ended"]
    run = tmp_path / "run"
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_000002"]
    # The weights that sampled step 4 are gone: without the second rank's share no rank can resume.
    without = shutil.copytree(run, tmp_path / "without")
    (without / "rollouts" / "step_000004.001.jsonl").unlink()
    errors = on_ranks(2, failed, rarely_saved, without)
    assert errors[0] == errors[1] and "step_000004.001.jsonl is missing" in errors[0], errors
    rows, _ = on_ranks(2, train_rows, rarely_saved, run)
    assert [row["step"] for row in rows if row["kind"] == "step"] == [3, 4]
    assert_same_bits(run, two_rank_run)


def test_a_critic_that_fails_ends_all_ranks_with_its_message(
    stale_recipe: Callable[..., Recipe], critic: Server, tmp_path: Path
) -> None:
    before, critic.behaviours = critic.behaviours, [says(oracle_critique)] * 15 + [refuses(401)]
    try:
        errors = on_ranks(2, failed, stale_recipe(tmp_path, SHARDED), tmp_path / "run")
    finally:
        critic.behaviours = before
    assert all("critic" in message and "another rank" not in message for message in errors), errors


def failed(recipe: Recipe, folder: Path) -> str:
    with pytest.raises(SelfteachError) as caught:
        run_to_end(recipe, folder)
    return str(caught.value)


@pytest.mark.slow
def test_metrics_report_the_overlap(two_rank_run: Path) -> None:
    for row in RunFolder(two_rank_run).metrics():
        if row["kind"] == "step":
            assert row["ranks"] == 2 and 0 <= row["overlap"] <= 1
