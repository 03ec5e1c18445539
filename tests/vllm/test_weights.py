"""A real server as the engine: the trainer's weights and logprobs after every update."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from served_policies import mismatch, move
from vllm_recipes import TOLERANCE, served_recipe

import vllm_server
from selfteach.runtime.run_folder import RunFolder
from selfteach.trainer.build import build
from selfteach.trainer.build_engine import require_engine
from selfteach.trainer.loop import run_to_end
from selfteach.types import Rollout, Sampling
from vllm_server import Server

TEMPERATURE = 0.7
SAMPLING = Sampling(samples=2, temperature=TEMPERATURE, max_tokens=8, seed=5)
SMALL: dict[str, Any] = {
    "model": {"path": str(vllm_server.MODEL)},
    "data": {
        "type": "chain_sums", "seed": 3, "min_terms": 3, "max_terms": 3, "max_digits": 1,
        "train": 4, "validation": 1, "test": 1,
    },
    "sampling": {"max_tokens": 8, "batch_size": 4, "temperature": TEMPERATURE},
    "train": {
        "steps": 2, "problems_per_step": 2, "group_size": 2, "checkpoint_every": 1,
        "threads": 1,
    },
    "context": {"type": "reference"},
    "objective": {"importance_cap": 2.0},
    "optimizer": {"lr": 2e-5},
    "evaluation": {"every": 2, "validation_k": 1, "test": False},
}  # fmt: skip
LORA = {"model": {"lora": {"rank": 4, "alpha": 8, "targets": ["q_proj", "v_proj"]}}}


recipe = partial(served_recipe, SMALL)


# Adapters first: they need the weights that the server was started with.
@pytest.mark.parametrize(("more", "by"), [(LORA, 0.05), ({}, 0.01)], ids=["lora", "full"])
def test_trainer_and_engine_agree_before_and_after_updates(
    engine: Server, more: dict[str, Any], by: float, print_line: Callable[[str], None]
) -> None:
    run_recipe = recipe(engine, more)
    require_engine(run_recipe)
    built = build(run_recipe)
    policy, problems = built.components.policy, built.task.train[:2]
    before: list[Rollout] = []
    for version in range(3):
        started = time.monotonic()
        built.components.engine.load_weights(policy.trainable.items(), version)
        loaded = time.monotonic() - started
        rollouts = built.components.engine.generate(problems, SAMPLING)
        difference = mismatch(built, rollouts, TEMPERATURE)
        print_line(
            f"version {version}: difference {difference:.1e} nats, weights loaded in {loaded:.1f} s"
        )
        assert difference < TOLERANCE
        if before:  # the old rollouts are far from the new weights: the update changed them
            assert mismatch(built, before, TEMPERATURE) > 10 * TOLERANCE
        again = built.components.engine.generate(problems, SAMPLING)
        assert [r.token_ids for r in again] == [r.token_ids for r in rollouts]
        before = rollouts
        move(built, by)


def test_a_run_of_two_steps(
    engine: Server, tmp_path: Path, print_line: Callable[[str], None]
) -> None:
    run_to_end(recipe(engine), tmp_path / "run")
    rows = [row for row in RunFolder(tmp_path / "run").metrics() if row["kind"] == "step"]
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        print_line(
            f"step {row['step']}: mismatch mean {row['mismatch_mean']:.1e}, "
            f"max {row['mismatch_max']:.1e}, KL {row['mismatch_kl']:.1e}"
        )
        assert row["mismatch_max"] < TOLERANCE
        assert row["importance_ratio_capped"] == 0.0


@pytest.mark.parametrize("ranks", [1, 2])
def test_it_samples_while_the_trainer_trains(
    ranks: int, engine: Server, tmp_path: Path, print_line: Callable[[str], None]
) -> None:
    """Step t + 1 is sampled while step t trains; two ranks are started by torchrun."""
    stale = {"train": {"steps": 3, "staleness": 1}, "sampling": {"batch_size": 2}}
    run = tmp_path / "run"
    RunFolder(run).create(recipe(engine, stale).model_dump(mode="json"), {})
    started = [sys.executable, "-m"]
    if ranks > 1:
        started += ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"]
    began = time.monotonic()
    done = subprocess.run(
        [*started, "selfteach", "resume", str(run)],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = [row for row in RunFolder(run).metrics() if row["kind"] == "step"]
    assert [row.get("ranks", 1) for row in rows] == [ranks] * 3
    paths = sorted((run / "rollouts").glob("step_*.jsonl"))
    rollouts = [json.loads(line) for path in paths for line in path.read_text().splitlines()]
    assert [rollout["policy_version"] for rollout in rollouts] == [0] * 8 + [1] * 4
    assert rows[0]["mismatch_max"] < TOLERANCE < rows[2]["mismatch_max"], "one update behind"
    overlaps = ", ".join(f"{row['overlap']:.2f}" for row in rows)
    print_line(f"{ranks} ranks: {time.monotonic() - began:.0f} s, overlaps {overlaps}")


def test_a_server_killed_in_a_batch_and_started_again_has_the_newest_weights(
    engine: Server,
) -> None:
    built = build(recipe(engine))
    policy, problems = built.components.policy, built.task.train
    move(built, 0.002)
    built.components.engine.load_weights(policy.trainable.items(), 1)
    longer = Sampling(samples=2, temperature=TEMPERATURE, max_tokens=24, seed=5)
    results: list[list[Rollout]] = []
    batch = threading.Thread(
        target=lambda: results.append(built.components.engine.generate(problems, longer))
    )
    batch.start()
    time.sleep(2.0)
    assert batch.is_alive(), "the server is killed during the batch"
    engine.stop(kill=True)
    engine.start()
    batch.join(timeout=900)
    assert results and len(results[0]) == 8
    assert mismatch(built, results[0]) < TOLERANCE
