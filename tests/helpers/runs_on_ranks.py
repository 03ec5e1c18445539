"""Runs in float64 on ranks, to be compared with one process; and faults to inject into them."""

from __future__ import annotations

import itertools
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import selfteach.models.loading as loading
from selfteach.config.recipe import Recipe
from selfteach.config.schema import merge
from selfteach.errors import SelfteachError, Terminated
from selfteach.evaluation.evaluation_record import load_evaluation
from selfteach.runtime import torchrun
from selfteach.runtime.run_folder import RunFolder, load_result
from selfteach.trainer import step
from selfteach.trainer.loop import run_to_end, train

RUN = {
    "data": {"type": "lab", "train": 12, "validation": 4, "test": 4},
    "sampling": {"max_tokens": 24, "batch_size": 4},
    "critic": {"type": "oracle"},
    "context": {"type": "step_aligned"},
    "teacher": {"type": "ema", "rate": 0.2},
    "train": {
        "steps": 4, "problems_per_step": 3, "group_size": 2,
        "checkpoint_every": 2, "threads": 1,
    },
    "evaluation": {"every": 4, "validation_k": 2, "test_k": 2},
}  # fmt: skip
SHARDED = {"distributed": {"shard": "full", "timeout_seconds": 60}}
TOLERANCE = 1e-6
"""Of weights, after four updates: Llama's norms are in float32 whatever the weights are, and ranks with
other samples share other prefixes (`tree_attention`)."""


def recipe(**changes: Any) -> Recipe:
    return Recipe.model_validate(merge(RUN, changes))


def _before_learning(hook: Callable[[int], None]) -> None:
    """Call a function with the number of the step before each `step.learn`."""
    learn, steps = step.learn, itertools.count(1)

    def learning(*args: Any) -> Any:
        hook(next(steps))
        return learn(*args)

    step.learn = learning


def run_until_a_rank_dies(recipe: Recipe, folder: Path) -> str:
    """End the second rank in step 3; return the error of the others."""

    def die(number: int) -> None:
        if number == 3 and torchrun.rank() == 1:
            os._exit(9)

    _before_learning(die)
    with pytest.raises(SelfteachError) as caught:
        run_to_end(recipe, folder)
    return str(caught.value)


def run_until_sigterm(recipe: Recipe, folder: Path) -> str:
    """Send SIGTERM to the second rank while it trains in step 2."""

    def terminate(number: int) -> None:
        if number == 2 and torchrun.rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    _before_learning(terminate)
    with pytest.raises(Terminated):
        run_to_end(recipe, folder)
    return "ended"


def train_rows(recipe: Recipe, folder: Path) -> list[dict[str, Any]]:
    """Train, and return the rows of metrics that this rank yields."""
    return list(train(recipe, folder))


def assert_same_weights(ours: Path, theirs: Path) -> None:
    """Compare the exported models, within the tolerance."""
    (name,) = {path.name for path in (theirs / "model").glob("*model.safetensors")}
    a, b = (load_file(folder / "model" / name) for folder in (ours, theirs))
    assert a.keys() == b.keys()
    for name, value in b.items():
        torch.testing.assert_close(a[name], value, rtol=0, atol=TOLERANCE)


def rollouts_of(run: Path) -> dict[str, list[tuple[tuple[int, ...], int]]]:
    """Return token ids and policy version of each stored rollout, by file."""
    rollouts = {}
    for path in sorted((run / "rollouts").glob("*.jsonl")):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        rollouts[path.stem] = [(tuple(row["token_ids"]), row["policy_version"]) for row in rows]
    return rollouts


def assert_same_run(ours: Path, theirs: Path, *, step: int = 4) -> None:
    """Compare weights, evaluation and metrics, but for times."""
    assert_same_weights(ours, theirs)
    assert load_evaluation(ours, "test", step) == load_evaluation(theirs, "test", step)
    for row, other in zip(RunFolder(ours).metrics(), RunFolder(theirs).metrics(), strict=True):
        for name in (row.keys() | other.keys()) - {"ranks", "kind"}:
            if not name.startswith(("time/", "active_", "waiting", "overlap")):
                assert row[name] == pytest.approx(other[name], rel=1e-5, abs=1e-6), name
    our_budget, their_budget = load_result(ours)["budget"], load_result(theirs)["budget"]
    assert {**our_budget, "seconds": 0} == {**their_budget, "seconds": 0}


def in_double() -> Any:
    """Load all models in float64: the body of a fixture."""
    loaded = loading.load_model
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "load_model", lambda *args, **kw: loaded(*args, **kw).double())
        torch.set_default_dtype(torch.float64)
        yield
        torch.set_default_dtype(torch.float32)
