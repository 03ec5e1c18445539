"""No micro-batch waits for its device: everything is enqueued before anything is read.

The device is PyTorch's ``meta``: it has shapes and no values, so whatever reads a value (``item``,
``nonzero``, the truth of a tensor) raises. It takes the branches of a GPU, kernels aside.
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import pytest
import torch

from selfteach.config.recipe import Recipe
from selfteach.config.schema import merge, validate
from selfteach.trainer import step
from selfteach.trainer.batching import collate
from selfteach.trainer.build import Built, build
from selfteach.types import Batch

RECIPE = {
    "data": {"type": "lab", "train": 2, "validation": 1, "test": 1},
    "sampling": {"max_tokens": 30},
    "critic": {"type": "oracle"},
    "context": {"type": "step_aligned"},
    "train": {"steps": 1, "problems_per_step": 2, "group_size": 2},
}
ALONE = {"context": {"type": "none"}, "critic": None}
CHANGES: dict[str, dict[str, Any]] = {
    "distillation": {},
    "adapters": {"model": {"lora": {"rank": 4}}},
    "recomputed": {"model": {"gradient_checkpointing": True}},
    "jsd": {"objective": {"type": "distillation", "divergence": "jsd"}},
    "top_k": {"objective": {"type": "distillation", "support": "top_k", "top_k": 8}},
    "sampled": {"objective": {"type": "distillation", "support": "sampled"}},
    "grpo": {"objective": {"type": "grpo"}, **ALONE},
    "grpo with penalty": {"objective": {"type": "grpo", "kl_coef": 0.1}, **ALONE},
    "gspo": {
        "objective": {"type": "grpo", "importance_level": "sequence", "importance_cap": 2.0}, **ALONE,
    },
    "hybrid": {"objective": {"type": "hybrid"}},
    "ema": {"teacher": {"type": "ema", "rate": 0.1}},
    "trust region": {"teacher": {"type": "trust_region", "student_mix": 0.1}},
}  # fmt: skip


def without_values(built: Built, patch: pytest.MonkeyPatch) -> None:
    """Move the policy and its teacher to the device without values."""
    policy, teacher = built.components.policy, built.components.teacher
    model = policy.model.to("meta")
    policy.trainable.update(
        {name: dict(model.named_parameters())[name] for name in policy.trainable}
    )
    weight_VH = model.get_output_embeddings().weight
    patch.setattr(policy, "_head", dataclasses.replace(policy._head, weight_VH=weight_VH))
    for name in ("_weights", "_initial"):
        if isinstance(weights := getattr(teacher, name, None), dict):
            patch.setattr(teacher, name, {key: value.to("meta") for key, value in weights.items()})
    # Autocast knows no such device; it is off here in any case.
    patch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())


def batches_of(built: Built) -> list[Batch]:
    components = built.components
    rollouts = components.engine.generate(built.task.train, components.sampling)
    samples = step.build_samples(components, step.verify_and_critique(components, rollouts))
    denominators = components.objective.denominators(samples)
    weights = [
        dataclasses.replace(one, weights=(0.1,) * len(one.weights), advantage=1.0)
        for one in components.objective.token_weights(samples, denominators, 0)
    ]
    return collate(samples, weights, pad_id=components.pad_id, micro_batch_tokens=100)


@pytest.mark.parametrize("change", CHANGES)
def test_no_micro_batch_waits_for_its_device(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    built = build(validate(Recipe, merge(RECIPE, CHANGES[change])))
    batches = batches_of(built)
    assert len(batches) > 1
    if built.components.objective.__class__.__name__ == "Grpo":  # an update after the first
        batches = [dataclasses.replace(b, old_logp_N=b.sampled_logp_N) for b in batches]
    without_values(built, monkeypatch)
    for batch in batches:
        statistics = step._backward(built.components, batch.to(torch.device("meta")))
        assert statistics["total"].is_meta and statistics["loss"].shape == batch.ids_N.shape
    gradients = [p.grad for p in built.components.policy.trainable.values() if p.grad is not None]
    assert gradients and all(grad.is_meta for grad in gradients)
