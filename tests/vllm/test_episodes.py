"""Episodes on a real server: each turn goes on from the ids so far, with the trainer's logprobs."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import counting_environment
from meter import Meter
from served_policies import mismatch, move, publish
from vllm_recipes import TOLERANCE, served_recipe

import vllm_server
from selfteach.runtime.run_folder import RunFolder
from selfteach.trainer.build import build
from selfteach.trainer.loop import run_to_end
from selfteach.types import Rollout, Sampling
from vllm_server import Server

TEMPERATURE = 0.7
SAMPLING = Sampling(samples=2, temperature=TEMPERATURE, max_tokens=64, seed=5)
SMALL: dict[str, Any] = {
    "environment": {
        "type": f"{counting_environment.__file__}:Counting", "options": {"last": 2}, "max_turns": 4,
    },
    "model": {"path": str(vllm_server.MODEL), "templates": "turns_bare"},
    "data": {
        "type": "chain_sums", "seed": 3, "min_terms": 3, "max_terms": 3, "max_digits": 1,
        "train": 4, "validation": 1, "test": 1,
    },
    "sampling": {"max_tokens": 64, "batch_size": 8, "temperature": TEMPERATURE},
    "train": {
        "steps": 2, "problems_per_step": 2, "group_size": 2, "checkpoint_every": 1, "threads": 1,
    },
    "context": {"type": "reference"},
    "optimizer": {"lr": 2e-5},
    "evaluation": {"every": 2, "validation_k": 1, "test": False},
}  # fmt: skip


recipe = partial(served_recipe, SMALL)


def test_turns_have_the_trainer_s_logprobs_before_and_after_an_update(
    engine: Server, print_line: Callable[[str], None]
) -> None:
    built, meter = build(recipe(engine)), Meter(engine.address)
    problems = built.task.train[:2]
    for version in range(2):
        publish(built, version)
        rollouts = built.components.engine.generate(problems, SAMPLING)
        turns = [len(rollout.turns) for rollout in rollouts]
        difference = mismatch(built, rollouts, TEMPERATURE)
        print_line(f"version {version}: turns {turns}, difference {difference:.1e} nats")
        assert max(turns) > 1, "an episode goes on after a reply"
        assert difference < TOLERANCE
        again = built.components.engine.generate(problems, SAMPLING)
        assert [one.token_ids for one in again] == [one.token_ids for one in rollouts]
        move(built, 0.01)
    print_line(f"prompt tokens of both versions: {meter.count('prompt_tokens_total')}")


def test_a_run_of_two_steps_trains_on_turns(engine: Server, tmp_path: Path) -> None:
    run_to_end(recipe(engine), tmp_path / "run")
    steps = [row for row in RunFolder(tmp_path / "run").metrics() if row["kind"] == "step"]
    assert [row["step"] for row in steps] == [1, 2]
    assert all(row["mismatch_max"] < TOLERANCE for row in steps)
    assert max(row["turns"] for row in steps) > 1 and steps[0]["environment_tokens"] > 0
    paths = sorted((tmp_path / "run" / "rollouts").glob("step_*.jsonl"))
    stored = [json.loads(line) for path in paths for line in path.read_text().splitlines()]
    assert [row["policy_version"] for row in stored] == [0] * 4 + [1] * 4
    assert {s["kind"] for row in stored for s in row["segments"]} == {"model", "environment"}


def test_episodes_go_on_when_a_killed_server_is_back(engine: Server) -> None:
    """Turns that were sampled before are not sampled again, and the others are the same."""
    built = build(recipe(engine))
    publish(built, 1)
    problems, started = built.task.train, time.monotonic()
    expected = built.components.engine.generate(problems, SAMPLING)
    takes_s = time.monotonic() - started
    results: list[list[Rollout]] = []
    batch = threading.Thread(
        target=lambda: results.append(built.components.engine.generate(problems, SAMPLING))
    )
    batch.start()
    time.sleep(takes_s / 2)
    assert batch.is_alive(), "the server is killed during the batch"
    engine.stop(kill=True)
    engine.start()
    batch.join(timeout=900)
    assert results and mismatch(built, results[0], TEMPERATURE) < TOLERANCE
    assert [one.token_ids for one in results[0]] == [one.token_ids for one in expected]
