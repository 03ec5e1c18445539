"""Small runs on a device, and the loss and gradient of one step."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from selfteach.config.recipe import Recipe
from selfteach.config.schema import merge, validate
from selfteach.trainer import step
from selfteach.trainer.batching import collate
from selfteach.trainer.build import Built
from selfteach.types import TrainingSample, Verdict

RUN: dict[str, Any] = {
    "model": {"path": "lab:two_styles"},
    "data": {"type": "lab", "train": 12, "validation": 4, "test": 4},
    "sampling": {"max_tokens": 40, "batch_size": 8},
    "train": {
        "steps": 3, "problems_per_step": 4, "group_size": 4, "checkpoint_every": 2,
        "threads": 1,
    },
    "evaluation": {"every": 3, "validation_k": 2, "test_k": 2},
}  # fmt: skip
EASY: dict[str, Any] = {"model": {"path": "lab:easy"}}
"""A model that is correct now and then: rewards differ."""
GRPO: dict[str, Any] = {**EASY, "objective": {"type": "grpo"}}
REFERENCE: dict[str, Any] = {"context": {"type": "reference"}}
ALIGNED: dict[str, Any] = {"critic": {"type": "oracle"}, "context": {"type": "step_aligned"}}
ARMS: dict[str, dict[str, Any]] = {
    "grpo": GRPO,
    "grpo, penalty": {"objective": {"type": "grpo", "kl_coef": 0.1, "importance_cap": 2.0}},
    "reference": REFERENCE,
    "step_aligned": ALIGNED,
    "reverse kl": {**ALIGNED, "objective": {"divergence": "reverse_kl"}},
    "forward kl, clipped": {**ALIGNED, "objective": {"divergence": "forward_kl", "clip": 0.5}},
    "top k": {**ALIGNED, "objective": {"support": "top_k", "top_k": 5}},
    "sampled": {**ALIGNED, "objective": {"divergence": "reverse_kl", "support": "sampled"}},
    "ema": {**ALIGNED, "teacher": {"type": "ema", "rate": 0.2}},
    "trust region": {**ALIGNED, "teacher": {"type": "trust_region", "student_mix": 0.3}},
    "lora": {**ALIGNED, "model": {"lora": {"rank": 4, "alpha": 8}}},
    "recomputed": {**ALIGNED, "model": {"gradient_checkpointing": True}},
    "few at a time": {**ALIGNED, "train": {"micro_batch_tokens": 256}},
    "hybrid": {
        **ALIGNED,
        "objective": {"type": "hybrid", "weight": {"start": 0.5, "end": 0.5}},
    },
}
LOW_PRECISION: dict[str, dict[str, Any]] = {
    "autocast": {"model": {"autocast": "bfloat16"}},
    "weights": {"model": {"weights_dtype": "bfloat16"}},
    "autocast, lora": {"model": {"autocast": "bfloat16", "lora": {"rank": 4, "alpha": 8}}},
    "weights, lora": {"model": {"weights_dtype": "bfloat16", "lora": {"rank": 4, "alpha": 8}}},
}


def recipe(device: str, *changes: Mapping[str, Any]) -> Recipe:
    values = merge(RUN, {"model": {"device": device}})
    for change in changes:
        values = merge(values, change)
    return validate(Recipe, values, where="test")


def training_samples(built: Built) -> list[TrainingSample]:
    """Return the training samples of a first step. Every other rollout counts as correct, so that
    rewards differ in each group."""
    components = built.components
    rollouts = components.engine.generate(built.task.problems("train")[:4], components.sampling)
    critiqued = [
        dataclasses.replace(m, verdict=Verdict(m.rollout.sample % 2 == 0, True, "x"))
        for m in step.verify_and_critique(components, rollouts)
    ]
    return step.build_samples(components, critiqued)


def loss_and_gradients(
    built: Built, samples: list[TrainingSample]
) -> tuple[float, dict[str, Tensor], list[Any]]:
    """Return loss, gradients and per-token statistics, as `step.learn` computes them."""
    components = built.components
    token_weights = components.objective.token_weights(
        samples, components.objective.denominators(samples), 0
    )
    batches = collate(
        samples,
        token_weights,
        pad_id=components.pad_id,
        micro_batch_tokens=components.micro_batch_tokens,
        layout=components.policy.layout,
    )
    stats = [step._backward(components, batch.to(components.policy.device)) for batch in batches]
    assert len(stats) == len(batches) > 0
    for batch_stats in stats:
        assert all(
            value.device.type == components.policy.device.type for value in batch_stats.values()
        )
    gradients = {
        name: weight.grad.detach().cpu()
        for name, weight in components.policy.trainable.items()
        if weight.grad is not None
    }
    components.policy.optimizer.zero_grad(set_to_none=True)
    return sum(batch["total"].sum().item() for batch in stats), gradients, stats
