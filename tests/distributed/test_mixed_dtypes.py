"""A step on two sharded ranks in mixed dtypes, for full weights and adapters under every teacher."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from on_ranks import on_ranks

from selfteach.config.recipe import Recipe
from selfteach.models.fsdp import whole
from selfteach.runtime.distributed import SINGLE_PROCESS, Ranks, init_ranks
from selfteach.trainer.build import build
from selfteach.trainer.step import train_step

TEACHERS: dict[str, dict[str, Any]] = {
    "initial": {"type": "initial"},
    "live": {"type": "live"},
    "ema": {"type": "ema", "rate": 0.3},
    "trust_region": {"type": "trust_region", "student_mix": 0.3},
}
LORA = {"rank": 4, "alpha": 8}


def recipe(weights: str, param: str | None, lora: bool, teacher: str, **changes: Any) -> Recipe:
    """Return a recipe; for ``param`` None nothing is sharded and all is float32."""
    model: dict[str, Any] = {"path": "lab:two_styles", "weights_dtype": weights}
    if param == "bfloat16":
        model["autocast"] = "bfloat16"
    shard = {"shard": "full", "param_dtype": param, "reduce_dtype": "float32"}
    return Recipe.model_validate(
        {
            "model": {**model, "lora": LORA if lora else None},
            "data": {"type": "lab", "train": 4, "validation": 1, "test": 1},
            "sampling": {"max_tokens": 40, "batch_size": 4},
            "critic": {"type": "oracle"},
            "context": {"type": "step_aligned"},
            "teacher": TEACHERS[teacher],
            "train": {"steps": 2, "problems_per_step": 4, "group_size": 2},
            "distributed": shard if param else {},
            **changes,
        }
    )


def steps(ranks: Ranks, recipe: Recipe) -> dict[str, Any]:
    """Return the loss of two steps, and the first moments after them as numpy arrays."""
    built = build(recipe, ranks)
    policy = built.components.policy
    losses = []
    for _ in range(2):
        _, metrics = train_step(built.components, built.task.problems("train"))
        losses.append(metrics["loss"])
    moments = {
        name: whole(policy.optimizer.state[param]["exp_avg"]).float().numpy()
        for name, param in policy.trainable.items()
        if param in policy.optimizer.state
    }
    return {"losses": losses, "moments": moments, "trainable": sorted(policy.trainable)}


def steps_of_rank(recipe: Recipe) -> dict[str, Any]:
    with init_ranks("cpu", 60.0) as ranks:
        return steps(ranks, recipe)


MATRIX = list(
    itertools.product(("float32", "bfloat16"), ("float32", "bfloat16"), (False, True), TEACHERS)
)


@pytest.mark.slow
@pytest.mark.parametrize(("weights", "param", "lora", "teacher"), MATRIX)
def test_a_sharded_step_in_mixed_dtypes_is_near_the_float32_step(
    weights: str, param: str, lora: bool, teacher: str
) -> None:
    single = steps(SINGLE_PROCESS, recipe("float32", None, lora, teacher))
    first, second = on_ranks(2, steps_of_rank, recipe(weights, param, lora, teacher))
    assert first["moments"].keys() == single["moments"].keys() == set(single["trainable"])
    assert first["losses"] == second["losses"]
    ours, theirs = (
        np.concatenate([run["moments"][name].ravel() for name in single["trainable"]])
        for run in (first, single)
    )
    assert np.isfinite(ours).all() and np.isfinite(first["losses"]).all()
    cosine = ours @ theirs / np.linalg.norm(ours) / np.linalg.norm(theirs)
    assert cosine > 0.5, "the same direction, up to rounding and other rollouts"
