"""Whole runs of SmolLM2 with a served critic: requests, the reply cache, and restarts."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from meter import Meter

import vllm_server
from selfteach.config.recipe import Recipe
from selfteach.config.schema import merge, validate
from selfteach.runtime.run_folder import RunFolder
from selfteach.trainer.loop import run_to_end
from vllm_server import Server

ROLLOUTS = 2 * 2 * 2
"""Steps × problems × rollouts per problem of the run below."""
FAILURES = ("empty", "truncated", "malformed", "misaligned", "wrong_answer")
SMALL: dict[str, Any] = {
    "model": {"path": str(vllm_server.MODEL), "autocast": "bfloat16"},
    "data": {
        "type": "chain_sums", "seed": 3, "min_terms": 3, "max_terms": 3, "max_digits": 1,
        "train": 8, "validation": 1, "test": 1,
    },
    "sampling": {"max_tokens": 24, "batch_size": 2},
    "context": {"type": "step_aligned"},
    "train": {
        "steps": 2, "problems_per_step": 2, "group_size": 2, "checkpoint_every": 1,
        "threads": 1,
    },
    "optimizer": {"lr": 2e-5},
    "evaluation": {"every": 2, "validation_k": 1, "test": False},
}  # fmt: skip


def critic(server: Server, folder: Path, **settings: Any) -> dict[str, Any]:
    return {
        "type": "endpoint", "base_url": server.url, "model": vllm_server.NAME, "max_tokens": 40,
        "reply_cache": str(folder / "replies.sqlite"), "max_attempts": 1, "http_retries": 0,
        "on_failure": {**dict.fromkeys(FAILURES, "fallback"), "malformed": "drop"}, **settings,
    }  # fmt: skip


def recipe(server: Server, folder: Path, **settings: Any) -> Recipe:
    values = merge(SMALL, {"critic": critic(server, folder, **settings)})
    return validate(Recipe, values, where="test")


def stored(folder: Path) -> list[tuple[int, int]]:
    """Return prompt and completion tokens of every reply that is on disk."""
    path = folder / "replies.sqlite"
    if not path.exists():
        return []
    with closing(sqlite3.connect(path, timeout=60)) as database:
        try:
            return database.execute(
                "SELECT prompt_tokens, completion_tokens FROM replies"
            ).fetchall()
        except sqlite3.OperationalError:  # the table is being made
            return []


def samples(run: Path) -> list[dict[str, Any]]:
    paths = sorted((run / "samples").glob("step_*.jsonl"))
    return [json.loads(line) for path in paths for line in path.read_text().splitlines()]


def wait_for(holds: Callable[[], bool], what: str, within_s: float = 1200.0) -> None:
    deadline = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def test_counts_add_up_and_a_second_run_sends_no_request(
    server: Server, meter: Meter, tmp_path: Path, print_line: Callable[[str], None]
) -> None:
    result = run_to_end(recipe(server, tmp_path), tmp_path / "run")
    replies, budget = stored(tmp_path), result["budget"]
    assert 0 < meter.completed == len(replies) == budget["critic_requests"] <= ROLLOUTS
    assert budget["critic_requests"] + budget["critic_cached"] == ROLLOUTS
    assert budget["critic_prompt_tokens"] == sum(p for p, _ in replies)
    assert budget["critic_completion_tokens"] == sum(c for _, c in replies)
    assert meter.count("prompt_tokens_total") == budget["critic_prompt_tokens"]
    assert meter.count("generation_tokens_total") == budget["critic_completion_tokens"]
    rows = [row for row in RunFolder(tmp_path / "run").metrics() if row["kind"] == "step"]
    for row in rows:
        failures = {k: v * 4 for k, v in row.items() if k.startswith("critique_failure/")}
        assert row["critiques"] + sum(failures.values()) == 4
        # Malformed critiques are dropped, other failures fall back to the reference.
        assert row["dropped"] * 4 == failures.get("critique_failure/malformed", 0.0)
    saved = samples(tmp_path / "run")
    assert len(saved) == ROLLOUTS and sum(row["dropped"] for row in rows) * 4 == sum(
        sample["dropped"] is not None for sample in saved
    )
    outcomes = [sample["critique"].get("reason", "critique") for sample in saved]
    print_line(f"SmolLM2 on {ROLLOUTS} rollouts: {', '.join(outcomes)}")
    again = run_to_end(recipe(server, tmp_path), tmp_path / "again")
    assert meter.completed == len(replies)
    assert again["budget"]["critic_requests"] == 0
    assert again["budget"]["critic_cached"] == ROLLOUTS


def test_a_server_killed_in_the_middle_of_a_step_and_started_again(
    server: Server, tmp_path: Path
) -> None:
    # Enough retries for a server that takes minutes to restart; one request at a time.
    patient = recipe(server, tmp_path, http_retries=100, concurrency=1)
    results: list[dict[str, Any]] = []
    run = threading.Thread(target=lambda: results.append(run_to_end(patient, tmp_path / "run")))
    run.start()
    wait_for(lambda: len(stored(tmp_path)) >= 1, "the first reply")
    server.stop(kill=True)
    before = len(stored(tmp_path))
    assert run.is_alive() and before < ROLLOUTS, "the server was killed during the run"
    server.start()
    run.join(timeout=1800)
    assert not run.is_alive() and results
    budget = results[0]["budget"]
    assert budget["critic_requests"] + budget["critic_cached"] == ROLLOUTS
    assert budget["critic_requests"] == len(stored(tmp_path))
    # The counters of a restarted server start at zero.
    fresh = Meter(server.address, since_start=True)
    assert fresh.completed == len(stored(tmp_path)) - before


def toml(values: dict[str, Any]) -> str:
    """Format a recipe as TOML: strings, numbers, booleans and flat tables."""
    return "\n".join(
        f"{section}.{key} = {json.dumps(value) if not isinstance(value, dict) else inline(value)}"
        for section, table in values.items()
        for key, value in table.items()
    )


def inline(table: dict[str, Any]) -> str:
    return "{ " + ", ".join(f"{key} = {json.dumps(value)}" for key, value in table.items()) + " }"


def test_a_trainer_killed_and_resumed_requests_only_missing_replies(
    server: Server, meter: Meter, tmp_path: Path
) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(toml({**SMALL, "critic": critic(server, tmp_path, concurrency=1)}))
    selfteach = [sys.executable, "-m", "selfteach"]
    trainer = subprocess.Popen(
        [*selfteach, "train", str(path), "--out", str(tmp_path / "run")],
        stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        wait_for(lambda: len(stored(tmp_path)) >= 2, "two replies")
    finally:
        trainer.send_signal(signal.SIGKILL)
        trainer.wait()
    before = stored(tmp_path)
    assert trainer.returncode == -signal.SIGKILL and len(before) < ROLLOUTS
    # The server ends or aborts the requests in flight.
    wait_for(lambda: meter.now("num_requests_running") == 0, "a quiet server")
    resumed = Meter(server.address)
    done = subprocess.run(
        [*selfteach, "resume", str(tmp_path / "run")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert resumed.completed == len(stored(tmp_path)) - len(before)
    assert set(before) <= set(stored(tmp_path))
    assert len(samples(tmp_path / "run")) == ROLLOUTS


@pytest.mark.parametrize("policy", ["drop", "fallback"])
def test_useless_critiques_do_what_the_recipe_says(
    server: Server, tmp_path: Path, policy: str
) -> None:
    useless = recipe(server, tmp_path, max_tokens=1, on_failure=dict.fromkeys(FAILURES, policy))
    result = run_to_end(useless, tmp_path / "run")
    rows = [row for row in RunFolder(tmp_path / "run").metrics() if row["kind"] == "step"]
    assert [row["critique_failure/truncated"] for row in rows] == [1.0, 1.0]
    assert [row["dropped"] for row in rows] == [float(policy == "drop")] * 2
    assert (result["budget"]["tokens_trained"] > 0) == (policy == "fallback")
    shown = {sample["context"] is not None for sample in samples(tmp_path / "run")}
    assert shown == {policy == "fallback"}
