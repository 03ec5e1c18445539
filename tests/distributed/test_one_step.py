"""One step on two ranks against the same step in one process, in float64: loss, gradients, teacher.

Stated tolerance: 1e-10 of a gradient's largest entry. Sums over ranks and micro-batches have another
order, nothing else differs.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from on_ranks import on_ranks
from torch import Tensor

from selfteach.config.recipe import Recipe
from selfteach.config.schema import merge
from selfteach.models import tree_attention
from selfteach.models.fsdp import whole
from selfteach.runtime.distributed import SINGLE_PROCESS, Ranks, joined
from selfteach.trainer.build import build
from selfteach.trainer.step import build_samples, learn, verify_and_critique
from selfteach.types import TrainingSample

TOLERANCE = 1e-10
BASE = {
    "data": {"type": "lab", "train": 3, "validation": 1, "test": 1},
    "sampling": {"max_tokens": 40, "batch_size": 2},
    "critic": {"type": "oracle"},
    "context": {"type": "step_aligned"},
    "train": {"steps": 2, "problems_per_step": 3, "group_size": 2},
}
GRPO = {"critic": None, "context": {"type": "none"}}
HYBRID = {
    "type": "hybrid", "weight": {"start": 0.5, "end": 0.5},
    "distillation": {"divergence": "reverse_kl"}, "grpo": {},
}  # fmt: skip
WAYS: dict[str, dict[str, Any]] = {
    "distillation": {},
    "sequence_mean": {"objective": {"aggregation": "sequence_mean"}},
    "grpo": {**GRPO, "objective": {"type": "grpo"}},
    "grpo_with_penalty": {
        **GRPO, "objective": {"type": "grpo", "kl_coef": 0.1}, "train": {"num_iterations": 2},
    },
    "hybrid": {"objective": HYBRID},
    "live": {"teacher": {"type": "live"}},
    "ema": {"teacher": {"type": "ema", "rate": 0.3}, "train": {"num_iterations": 2}},
    "trust_region": {
        "teacher": {"type": "trust_region", "student_mix": 0.3}, "train": {"num_iterations": 2},
    },
    "lora": {"model": {"lora": {"rank": 4, "alpha": 8}}, "train": {"num_iterations": 2}},
    "half": {"distributed": {"param_dtype": "bfloat16", "reduce_dtype": "float32"}},
    "recomputed": {"model": {"gradient_checkpointing": True}},
}  # fmt: skip


@pytest.fixture(autouse=True)
def _double() -> Any:
    looks = tree_attention.enable_tree_attention
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
    tree_attention.enable_tree_attention = looks


@functools.cache
def lessons_of(way: str) -> list[TrainingSample]:
    """Six answers to three questions, sampled and marked in one process; right ones among wrong."""
    built = build(recipe(way, "none"))
    components = built.components
    critiqued = verify_and_critique(
        components, components.engine.generate(built.task.problems("train"), components.sampling)
    )
    for index in (0, 3):  # so that groups differ and GRPO has something to compare
        right = dataclasses.replace(
            critiqued[index].verdict, correct=not critiqued[index].verdict.correct
        )
        critiqued[index] = dataclasses.replace(critiqued[index], verdict=right)
    return build_samples(components, critiqued)


def recipe(way: str, shard: str) -> Recipe:
    return Recipe.model_validate(merge(merge(BASE, WAYS[way]), {"distributed": {"shard": shard}}))


def step(
    ranks: Ranks, way: str, shard: str, samples: list[TrainingSample], micro_batch_tokens: int
) -> dict[str, Any]:
    """Metrics, gradients of the last update before clipping, and weights after a step."""
    import selfteach.trainer.build as building

    # A sharded pass folds nothing (`branches`), and Llama's norms round to float32: states that differ
    # in their last bit may differ in the eighth digit behind it.
    tree_attention.enable_tree_attention = lambda _: False
    loaded = building.load_model
    building.load_model = lambda *told: loaded(*told).double()  # type: ignore[assignment]
    try:
        components = build(recipe(way, shard), ranks).components
    finally:
        building.load_model = loaded
    components = dataclasses.replace(
        components, micro_batch_tokens=micro_batch_tokens, chunk_tokens=7
    )
    gradients: dict[str, Tensor] = {}

    def look(*_: object) -> None:
        gradients.update(
            {
                n: whole(p.grad).clone()
                for n, p in components.policy.trainable.items()
                if p.grad is not None
            }
        )

    components.policy.optimizer.register_step_pre_hook(look)
    metrics = learn(components, samples)
    components.engine.load_weights(components.policy.trainable.items(), components.policy.version)
    sampler = getattr(components.engine, "_engine", components.engine)
    published = dict(sampler._model.named_parameters())
    weights = {n: whole(p).clone() for n, p in components.policy.trainable.items()}
    assert all(torch.equal(published[n], w) for n, w in weights.items())
    teacher = {n: whole(t).clone() for n, t in components.teacher.state().items()}
    numpy = [{n: t.numpy() for n, t in d.items()} for d in (gradients, weights, teacher)]
    return {"metrics": metrics, "gradients": numpy[0], "weights": numpy[1], "teacher": numpy[2]}


def step_of_rank(*args: Any) -> dict[str, Any]:
    with joined("cpu", 60.0) as ranks:
        return step(ranks, *args)


def assert_same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours["metrics"].keys() == theirs["metrics"].keys()
    for name, value in theirs["metrics"].items():
        assert ours["metrics"][name] == pytest.approx(value, rel=1e-9, abs=1e-12), name
    assert ours["gradients"], "nothing was learned"
    for kind in ("gradients", "teacher"):
        assert ours[kind].keys() == theirs[kind].keys()
        for name, value in theirs[kind].items():
            error = abs(ours[kind][name] - value).max()
            assert error <= TOLERANCE * max(1e-3, abs(value).max()), (kind, name, error)


QUICK = {(way, "full") for way in ("distillation", "grpo_with_penalty", "ema", "lora")}
PAIRS = [
    pytest.param(*pair, marks=[] if pair in QUICK else [pytest.mark.slow])
    for pair in itertools.product([way for way in WAYS if way != "half"], ("none", "full"))
]


@pytest.mark.parametrize("way, shard", PAIRS)
def test_two_ranks_take_the_step_of_one(way: str, shard: str) -> None:
    samples = lessons_of(way if way.startswith("grpo") else "distillation")
    alone = step(SINGLE_PROCESS, way, "none", samples, 10_000)
    for both in on_ranks(2, step_of_rank, way, shard, samples, 10_000):
        assert_same(both, alone)


SPLITS = tuple(itertools.product((5, 1), (1, 120)))
"""Five samples on two ranks (uneven) and one (a rank has none), in micro-batches of many sizes."""


def steps(shard: str, samples: list[TrainingSample]) -> list[dict[str, Any]]:
    with joined("cpu", 60.0) as ranks:
        return [step(ranks, "hybrid", shard, samples[:count], tokens) for count, tokens in SPLITS]


@pytest.mark.parametrize("shard", ["none", "full"])
def test_no_split_changes_the_step(shard: str) -> None:
    samples = lessons_of("distillation")
    alone = {
        count: step(SINGLE_PROCESS, "hybrid", "none", samples[:count], 10_000) for count in (5, 1)
    }
    for said in on_ranks(2, steps, shard, samples):
        for (count, _), both in zip(SPLITS, said, strict=True):
            assert_same(both, alone[count])


def test_weights_gathered_in_half_precision_take_nearly_the_same_step() -> None:
    """bfloat16 has 8 bits: gradients agree in direction and size, stored weights stay as they were."""
    samples = lessons_of("distillation")
    alone = step(SINGLE_PROCESS, "distillation", "none", samples, 10_000)
    exact = np.concatenate([alone["gradients"][n].ravel() for n in sorted(alone["gradients"])])
    for both in on_ranks(2, step_of_rank, "half", "full", samples, 10_000):
        told = np.concatenate([both["gradients"][n].ravel() for n in sorted(both["gradients"])])
        cosine = exact @ told / np.linalg.norm(exact) / np.linalg.norm(told)
        assert 0.98 < cosine < 1 - 1e-9, "close, and not the exact step by mistake"
        assert np.linalg.norm(told) == pytest.approx(np.linalg.norm(exact), rel=0.1)
        assert {weight.dtype for weight in both["weights"].values()} == {np.dtype("float64")}
