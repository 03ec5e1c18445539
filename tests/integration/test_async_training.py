"""Steps that overlap: the same end however they are timed, killed or told to end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import command_line, kill_when, run_until
from safetensors.torch import load_file
from same_run import assert_same
from scripted_critic import oracle_critique
from scripted_server import refuses, says, serving

from selfteach.config.recipe import Recipe
from selfteach.config.schema import merge, validate
from selfteach.errors import CheckpointError, LossError, RecipeError
from selfteach.models import policy
from selfteach.runtime.run_folder import RunFolder
from selfteach.trainer.loop import run_to_end, train

TINY = {
    "model": {"path": "lab:two_styles"},
    "data": {"type": "lab", "train": 8, "validation": 2, "test": 2},
    "sampling": {"max_tokens": 24, "batch_size": 4},
    "critic": {"type": "oracle"},
    "context": {"type": "step_aligned"},
    "objective": {"type": "distillation", "importance_cap": 2.0},
    "train": {
        "steps": 5, "problems_per_step": 2, "group_size": 2, "staleness": 2,
        "checkpoint_every": 2, "threads": 1,
    },
    "evaluation": {"every": 5, "validation_k": 1, "test_k": 1},
}  # fmt: skip


def recipe(**changes: Any) -> Recipe:
    return validate(Recipe, merge(TINY, changes), where="test")


def answers(folder: Path) -> list[list[dict[str, Any]]]:
    """Of each step."""
    batches = []
    for step in range(1, 6):
        files = sorted(folder.glob(f"rollouts/step_{step:06d}.*.jsonl"))
        batches.append(
            [json.loads(line) for path in files for line in path.read_text().splitlines()]
        )
    return batches


def versions(folder: Path) -> list[set[int]]:
    return [{row["policy_version"] for row in rows} for rows in answers(folder)]


def tokens(folder: Path) -> list[list[list[int]]]:
    return [[row["token_ids"] for row in rows] for rows in answers(folder)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    run_to_end(recipe(), folder)
    return folder


def test_which_weights_answer_a_step_depends_on_the_step_alone(whole: Path, tmp_path: Path) -> None:
    assert versions(whole) == [{0}, {0}, {0}, {1}, {2}]
    rows = [row for row in RunFolder(whole).metrics() if row["kind"] == "step"]
    assert all(row["mismatch_max"] < 1e-3 for row in rows[:1])
    assert rows[-1]["mismatch_max"] > 1e-3, "two versions old"


def test_sampling_beside_learning_gives_the_same_answers_and_resumes(
    whole: Path, tmp_path: Path
) -> None:
    separate = recipe(sampling={"separate_copy": True})
    run_to_end(separate, tmp_path / "beside")
    assert versions(tmp_path / "beside") == versions(whole)
    # A copy lies elsewhere in memory, which moves the last bits of a logit, and no token here.
    assert tokens(tmp_path / "beside") == tokens(whole)
    stopping = train(separate, tmp_path / "stopped")
    for _ in range(4):
        next(stopping)
    stopping.close()
    run_to_end(separate, tmp_path / "stopped")
    assert_same(tmp_path / "beside", tmp_path / "stopped")


def command(folder: Path) -> list[str]:
    return [sys.executable, "-c", "from selfteach.cli import main; main()", "resume", str(folder)]


@pytest.mark.parametrize(
    "moment",
    [
        "rollouts/step_000003.000.jsonl",
        pytest.param("samples/step_000002.jsonl", marks=pytest.mark.slow),
        "checkpoints/step_000002",
    ],
)
def test_kill_9_with_steps_under_way(moment: str, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    kill_when((folder / moment).exists, run_to_end, recipe(), folder)
    written = {p: p.stat().st_mtime_ns for p in folder.glob("rollouts/*.jsonl")}
    run_to_end(recipe(), folder)
    assert_same(whole, folder)
    assert versions(folder) == versions(whole)
    assert all(path.stat().st_mtime_ns == at for path, at in written.items()), "sampled twice"


def test_sigterm_saves_what_was_learned_and_says_so(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    RunFolder(folder).create(recipe().model_dump(mode="json"), {})
    first, errors = folder / "samples" / "step_000001.jsonl", tmp_path / "errors.txt"
    process = run_until(first.exists, command_line, errors, "resume", folder)
    process.terminate()
    process.join(120)
    output = errors.read_text()
    assert process.exitcode == 143, output
    assert "continue with selfteach resume" in output.splitlines()[-1], output
    (saved,) = (folder / "checkpoints").glob("step_*")
    assert saved.name in ("step_000001", "step_000002")
    run_to_end(recipe(), folder)
    assert_same(whole, folder)


def test_answers_that_cannot_be_written_again_are_not_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    kill_when((folder / "checkpoints" / "step_000004").exists, run_to_end, recipe(), folder)
    (folder / "rollouts" / "step_000005.000.jsonl").unlink()
    with pytest.raises(CheckpointError, match=r"step_000005\.000\.jsonl is missing"):
        run_to_end(recipe(), folder)


def test_too_few_problems_for_the_first_steps_is_one_line(tmp_path: Path) -> None:
    few = recipe(data={"train": 5})
    with pytest.raises(RecipeError, match="need 6 problems, of which there are 5"):
        run_to_end(few, tmp_path / "run")


def test_a_loss_that_is_none_ends_the_run_with_its_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = policy.Policy.optimizer_step

    def spoils(self: policy.Policy) -> dict[str, float]:
        output = real(self)
        if self.version == 1:
            with torch.no_grad():
                next(iter(self.trainable.values())).fill_(float("nan"))
        return output

    monkeypatch.setattr(policy.Policy, "optimizer_step", spoils)
    folder = tmp_path / "run"
    with pytest.raises(LossError, match=r"step 2: the loss is nan; no update was made"):
        run_to_end(recipe(train={"staleness": 1}), folder)
    saved = load_file(folder / "nonfinite" / "step_000002.safetensors")
    assert saved["stats.total"].isnan().all() and len(saved["ids_N"]) == len(saved["weight_N"]) > 0
    assert [row["step"] for row in RunFolder(folder).metrics() if row["kind"] == "step"] == [1]


@pytest.mark.slow
def test_a_disk_that_is_full_at_a_checkpoint(whole: Path, tmp_path: Path) -> None:
    """The system refuses to let a file grow; what safetensors says of it is one line."""
    folder = tmp_path / "run"
    RunFolder(folder).create(recipe().model_dump(mode="json"), {})
    limited = ["sh", "-c", 'ulimit -f 400; exec "$@"', "sh", *command(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    full = subprocess.run(limited, env=environment, capture_output=True, text=True)
    assert full.returncode == 2 and "Traceback" not in full.stderr, full.stderr
    assert "nothing is lost: make room" in full.stderr.splitlines()[-1]
    assert list((folder / "checkpoints").iterdir()) == [], "what was half-written makes room"
    run_to_end(recipe(), folder)
    assert_same(whole, folder)


def test_a_clock_that_jumps_changes_nothing(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    days = iter(range(1_000_000))
    monkeypatch.setattr(time, "time", lambda: 2e9 - 86_400.0 * next(days))
    run_to_end(recipe(), tmp_path / "run")
    assert_same(whole, tmp_path / "run")


def test_a_critic_that_is_gone_for_a_while_is_waited_for(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A minute, thirty times as fast: refused, then nobody there, then back; asked once for all."""
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.5 / 30)
    monkeypatch.setattr("openai._base_client.MAX_RETRY_DELAY", 8.0 / 30)
    with serving(says(oracle_critique)) as first:
        port, requests = first.port, first.requests
        critic = {
            "type": "endpoint", "base_url": first.url, "model": "oracle", "max_tokens": 64,
            "reply_cache": str(tmp_path / "replies.sqlite"), "min_similarity": 0.0, "concurrency": 2,
        }  # fmt: skip
        rows = train(recipe(critic=critic), tmp_path / "run")
        assert next(rows)["kind"] == "validation"
        assert next(rows)["step"] == 1
        before = len(requests)
        first.behaviours = [refuses(503)]
        back = threading.Timer(2.0, lambda: first.behaviours.__setitem__(0, says(oracle_critique)))
        back.start()
        for row in rows:
            assert row.get("critique_failure/unavailable", 0) == 0
        back.join()
    assert port and len(requests) > before
    assert_same(whole, tmp_path / "run")


def test_two_runs_started_on_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("selfteach.runtime.run_folder.LOCK_PATIENCE_S", 0.2)
    first = tmp_path / "run" / "rollouts" / "step_000001.000.jsonl"
    process = run_until(first.exists, run_to_end, recipe(), tmp_path / "run")
    assert process.pid is not None
    os.kill(process.pid, signal.SIGSTOP)
    try:
        with pytest.raises(CheckpointError, match="another process is using"):
            run_to_end(recipe(), tmp_path / "run")
    finally:
        process.kill()
        process.join()
