"""No micro-batch waits for its device: everything is enqueued before anything is read.

The device is PyTorch's ``meta`` (`without_values`). What is read once per update or step is named here.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import packed_by_loop
import pytest
from without_values import META, Reads, move_to_meta

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
MICRO_BATCH = 100
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


def batches_of(built: Built) -> list[Batch]:
    components = built.components
    rollouts = components.engine.generate(built.task.train, components.sampling)
    samples = step.build_samples(components, step.verify_and_critique(components, rollouts))
    denominators = components.objective.denominators(samples)
    weights = [
        dataclasses.replace(one, weights=(0.1,) * len(one.weights), advantage=1.0)
        for one in components.objective.token_weights(samples, denominators, 0)
    ]
    return collate(
        samples, weights, pad_id=components.pad_id, micro_batch_tokens=MICRO_BATCH,
        layout=components.policy.layout,
    )  # fmt: skip


def built_as(change: str, layout: str, patch: pytest.MonkeyPatch) -> Built:
    if layout == "packed":
        packed_by_loop.install(patch)
    built = build(validate(Recipe, merge(RECIPE, CHANGES[change])))
    assert built.components.policy.packs_sequences == (layout == "packed")
    return built


CASES = [
    pytest.param(
        change, layout,
        marks=[] if layout == "padded" or change in ("distillation", "grpo") else [pytest.mark.slow],
    )
    for change in CHANGES
    for layout in ("padded", "packed")
]  # fmt: skip


@pytest.mark.parametrize("change, layout", CASES)
def test_no_micro_batch_waits_for_its_device(
    change: str, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = built_as(change, layout, monkeypatch)
    batches = batches_of(built)
    assert len(batches) > 1
    if built.components.objective.__class__.__name__ == "Grpo":  # an update after the first
        batches = [dataclasses.replace(b, old_logp_N=b.sampled_logp_N) for b in batches]
    move_to_meta(built, monkeypatch)
    batches = [batch.to(META) for batch in batches]
    with Reads() as noted:
        for batch in batches:
            statistics = step._backward(built.components, batch)
            assert statistics["total"].is_meta and statistics["loss"].shape == batch.ids_N.shape
    gradients = [p.grad for p in built.components.policy.trainable.values() if p.grad is not None]
    assert gradients and all(grad.is_meta for grad in gradients)
    assert not noted.reads and not noted.copies, "what is copied there waits too"


PER_UPDATE = ("require_finite", "optimizer_step")
"""Functions that read once per update: whether all losses are finite; the gradient's norm."""
PER_STEP = {"summarize_tokens": 1, "mean": 4, "max": 1}
"""Reads of the first update's metrics, by function: the loss; means and a maximum over tokens."""


@pytest.mark.parametrize(
    "change, layout, means",
    [
        ("distillation", "packed", 4),
        pytest.param("distillation", "padded", 4, marks=pytest.mark.slow),
        pytest.param("ema", "padded", 4, marks=pytest.mark.slow),
        pytest.param("hybrid", "packed", 5, marks=pytest.mark.slow),
    ],
)
def test_a_step_reads_as_often_however_many_micro_batches_it_has(
    change: str, layout: str, means: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = built_as(change, layout, monkeypatch)
    updates, components = 2, dataclasses.replace(built.components, num_iterations=2)
    rollouts = components.engine.generate(built.task.train, components.sampling)
    samples = step.build_samples(components, step.verify_and_critique(components, rollouts))
    move_to_meta(built, monkeypatch)
    expected = dict.fromkeys(PER_UPDATE, updates) | PER_STEP | {"mean": means}
    copies = []
    for tokens in (10_000, MICRO_BATCH):
        with Reads() as noted:
            step.learn(dataclasses.replace(components, micro_batch_tokens=tokens), samples)
        assert noted.reads == expected
        assert noted.copies.keys() == {"to"}, "batches are copied before the first pass"
        copies.append(noted.copies["to"])
    assert copies[0] < copies[1], "the second step has more micro-batches"
