"""One step on two ranks against the same step in one process, in float64: loss, gradients, teacher.

Stated tolerance: 1e-10 of a gradient's largest entry. Sums over ranks and micro-batches have another
order; nothing else differs.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import numpy as np
import packed_by_loop
import pytest
import torch
from on_ranks import on_ranks
from torch import Tensor
from torch.distributed.tensor import DTensor

from selfteach.config.recipe import Recipe
from selfteach.config.schema import merge
from selfteach.models import loading, tree_attention
from selfteach.models.fsdp import whole
from selfteach.rollout.journaled_engine import BatchedEngine
from selfteach.runtime.distributed import SINGLE_PROCESS, Ranks, init_ranks
from selfteach.trainer.build import build
from selfteach.trainer.step import Components, build_samples, learn, verify_and_critique
from selfteach.types import TrainingSample

TOLERANCE = 1e-10
PREAMBLE = tuple(range(3, 27))
"""Tokens with which all prompts can begin."""
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
VARIANTS: dict[str, dict[str, Any]] = {
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
    "bf16": {"distributed": {"param_dtype": "bfloat16", "reduce_dtype": "float32"}},
    "recomputed": {"model": {"gradient_checkpointing": True}},
}  # fmt: skip


@pytest.fixture(autouse=True)
def _double() -> Any:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@functools.cache
def samples_of(variant: str) -> list[TrainingSample]:
    """Return samples of six rollouts of three problems, made in one process; some are correct."""
    built = build(recipe(variant, "none"))
    components = built.components
    critiqued = verify_and_critique(
        components, components.engine.generate(built.task.problems("train"), components.sampling)
    )
    for index in (0, 3):  # so that rewards differ within groups, for GRPO
        flipped = dataclasses.replace(
            critiqued[index].verdict, correct=not critiqued[index].verdict.correct
        )
        critiqued[index] = dataclasses.replace(critiqued[index], verdict=flipped)
    return build_samples(components, critiqued)


def recipe(variant: str, shard: str) -> Recipe:
    return Recipe.model_validate(
        merge(merge(BASE, VARIANTS[variant]), {"distributed": {"shard": shard}})
    )


def step(
    ranks: Ranks, variant: str, shard: str, samples: list[TrainingSample], micro_batch_tokens: int,
    way: str = "padded",
) -> dict[str, Any]:  # fmt: skip
    """Return metrics, gradients of the last update before clipping, weights after a step, and tokens.

    ``way`` is that of passes: padded rows, trees, or packed trees.
    """
    loaded = loading.load_model
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "load_model", lambda *args, **kw: loaded(*args, **kw).double())
        if way == "padded":
            # Llama's norms round to float32: states that differ in their last bit, as those of trees
            # of other micro-batches do, may differ in the eighth digit after it.
            patch.setattr(tree_attention, "enable_tree_attention", lambda _: False)
        if way == "packed":
            packed_by_loop.install(patch)
        components = build(recipe(variant, shard), ranks).components
        assert components.policy.packs_sequences == (way == "packed")
        for weight in components.policy.model.parameters():  # nothing is left of what was proved
            assert weight.grad is None and isinstance(weight, DTensor) == (shard == "full")
        return _step(components, samples, micro_batch_tokens)


def _step(
    components: Components, samples: list[TrainingSample], micro_batch_tokens: int
) -> dict[str, Any]:
    components = dataclasses.replace(
        components, micro_batch_tokens=micro_batch_tokens, chunk_tokens=7
    )
    gradients: dict[str, Tensor] = {}

    def record_gradients(*_: object) -> None:
        gradients.update(
            {
                n: whole(p.grad).clone()
                for n, p in components.policy.trainable.items()
                if p.grad is not None
            }
        )

    components.policy.optimizer.register_step_pre_hook(record_gradients)
    tokens = list[int]()
    components.policy._backbone.layers[0].mlp.register_forward_pre_hook(
        lambda _, inputs: tokens.append(inputs[0].shape[:-1].numel())
    )
    metrics = learn(components, samples)
    components.engine.load_weights(components.policy.trainable.items(), components.policy.version)
    batched = components.engine
    assert isinstance(batched, BatchedEngine)
    engine: Any = getattr(batched.engine, "_engine", batched.engine)
    published = dict(engine._model.named_parameters())
    weights = {n: whole(p).clone() for n, p in components.policy.trainable.items()}
    assert all(torch.equal(published[n], w) for n, w in weights.items())
    teacher = {n: whole(t).clone() for n, t in components.teacher.state().items()}
    numpy = [{n: t.numpy() for n, t in d.items()} for d in (gradients, weights, teacher)]
    return {
        "metrics": metrics, "gradients": numpy[0], "weights": numpy[1], "teacher": numpy[2],
        "tokens": sum(tokens),
    }  # fmt: skip


def step_of_rank(*args: Any) -> dict[str, Any]:
    with init_ranks("cpu", 60.0) as ranks:
        return step(ranks, *args)


def assert_same(ours: dict[str, Any], theirs: dict[str, Any], tolerance: float = TOLERANCE) -> None:
    assert ours["metrics"].keys() == theirs["metrics"].keys()
    for name, value in theirs["metrics"].items():
        close = pytest.approx(value, rel=10 * tolerance, abs=tolerance / 100)
        assert ours["metrics"][name] == close, name
    assert ours["gradients"], "no gradient"
    for kind in ("gradients", "teacher"):
        assert ours[kind].keys() == theirs[kind].keys()
        for name, value in theirs[kind].items():
            error = abs(ours[kind][name] - value).max()
            assert error <= tolerance * max(1e-3, abs(value).max()), (kind, name, error)


QUICK = {(variant, "full") for variant in ("grpo_with_penalty", "ema", "lora")}
"""Distillation beside GRPO, sharded and not, is in the test of micro-batches."""
PAIRS = [
    pytest.param(*pair, marks=[] if pair in QUICK else [pytest.mark.slow])
    for pair in itertools.product(
        [variant for variant in VARIANTS if variant != "bf16"], ("none", "full")
    )
]


@pytest.mark.parametrize("variant, shard", PAIRS)
def test_two_ranks_take_the_step_of_one_process(variant: str, shard: str) -> None:
    samples = samples_of(variant if variant.startswith("grpo") else "distillation")
    single = step(SINGLE_PROCESS, variant, "none", samples, 10_000)
    for result in on_ranks(2, step_of_rank, variant, shard, samples, 10_000):
        assert_same(result, single)


SPLITS = ((5, 1), (5, 120), (1, 120))
"""Five samples on two ranks (uneven), in micro-batches of one and of several; one (a rank has none)."""


def steps(shard: str, samples: list[TrainingSample]) -> list[dict[str, Any]]:
    with init_ranks("cpu", 60.0) as ranks:
        return [step(ranks, "hybrid", shard, samples[:count], tokens) for count, tokens in SPLITS]


@pytest.mark.parametrize("shard", ["none", "full"])
def test_the_split_into_micro_batches_does_not_change_the_step(shard: str) -> None:
    samples = samples_of("distillation")
    single = {
        count: step(SINGLE_PROCESS, "hybrid", "none", samples[:count], 10_000) for count in (5, 1)
    }
    for results in on_ranks(2, steps, shard, samples):
        for (count, _), result in zip(SPLITS, results, strict=True):
            assert_same(result, single[count])


def behind_a_preamble(sample: TrainingSample) -> TrainingSample:
    rollout = sample.rollout
    longer = dataclasses.replace(rollout, prompt_ids=PREAMBLE + rollout.prompt_ids)
    teacher_prompt = PREAMBLE + (sample.teacher_prompt_ids or ())
    critiqued = dataclasses.replace(sample.critiqued, rollout=longer)
    return dataclasses.replace(sample, critiqued=critiqued, teacher_prompt_ids=teacher_prompt)


@pytest.mark.parametrize("way", ["trees", "packed"])
@pytest.mark.parametrize("variant", ["distillation", "recomputed"])
def test_sharded_ranks_compute_what_prompts_share_once(variant: str, way: str) -> None:
    samples = [behind_a_preamble(sample) for sample in samples_of("distillation")]
    single = step(SINGLE_PROCESS, variant, "none", samples, 10_000)
    results = on_ranks(2, step_of_rank, variant, "full", samples, 10_000, way)
    for result in results:
        assert_same(result, single, 1e-6)
    assert sum(result["tokens"] for result in results) < 0.9 * single["tokens"]


def test_weights_gathered_in_bf16_take_nearly_the_same_step() -> None:
    """bfloat16 has 8 bits: gradients agree in direction and size, stored weights stay as they were."""
    samples = samples_of("distillation")
    single = step(SINGLE_PROCESS, "distillation", "none", samples, 10_000)
    exact = np.concatenate([single["gradients"][n].ravel() for n in sorted(single["gradients"])])
    for result in on_ranks(2, step_of_rank, "bf16", "full", samples, 10_000):
        approximate = np.concatenate(
            [result["gradients"][n].ravel() for n in sorted(result["gradients"])]
        )
        cosine = exact @ approximate / np.linalg.norm(exact) / np.linalg.norm(approximate)
        assert 0.98 < cosine < 1 - 1e-9, "close, but not the exact step"
        assert np.linalg.norm(approximate) == pytest.approx(np.linalg.norm(exact), rel=0.1)
        assert {weight.dtype for weight in result["weights"].values()} == {np.dtype("float64")}
