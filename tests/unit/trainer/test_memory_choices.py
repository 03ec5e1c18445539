"""The micro-batch and gradient checkpointing follow the device where a recipe leaves them open."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from selfteach.commands.check.sizes import device_load, measure_offline
from selfteach.config.recipe import Recipe
from selfteach.config.schema import merge, validate
from selfteach.models.architectures import known_shapes
from selfteach.trainer import device_load as device_load_module
from selfteach.trainer import step
from selfteach.trainer.batching import collate
from selfteach.trainer.build import build
from selfteach.trainer.device_load import with_memory_choices
from selfteach.trainer.device_memory import (
    FILLED,
    MICRO_BATCHES,
    DeviceLoad,
    VllmMemory,
    fit,
    memory,
)
from selfteach.trainer.loop import run_to_end, train
from selfteach.types import Batch

SHAPE = known_shapes()["Qwen/Qwen3-1.7B"]
LOAD = DeviceLoad(
    shape=SHAPE, parameters=SHAPE.parameters, trained=10**7, adapters=(32, 7), weight_bytes=2,
    compute_bytes=2, recompute=False, copies=0, micro_batch_tokens=MICRO_BATCHES[0],
    chunk_entries=2**25, sample_rows=64, sample_length=1_000, chooses_micro_batch=True,
    chooses_recompute=True,
)  # fmt: skip
GIB = 2**30


def training_bytes(load: DeviceLoad) -> int:
    estimate = memory(load)
    return sum(item.bytes for item in (*estimate.always, *estimate.training))


def chosen(gib: float, **changes: object) -> tuple[int, bool]:
    load = fit(replace(LOAD, **changes), gib * GIB)  # type: ignore[arg-type]
    return load.micro_batch_tokens, load.recompute


def test_smaller_devices_get_smaller_micro_batches_then_recomputation() -> None:
    choices = list(dict.fromkeys(chosen(gib) for gib in (141, 80, 48, 24, 16, 12, 8, 6, 4)))
    assert choices[0] == (16_384, False)
    assert choices[-1] == (2_048, True), "nothing fits: the least that can be tried"
    recomputed = [recompute for _, recompute in choices]
    assert recomputed == sorted(recomputed)
    for recompute in (False, True):
        sizes = [tokens for tokens, r in choices if r == recompute]
        assert sizes == sorted(sizes, reverse=True) and sizes


def test_what_the_recipe_says_stays() -> None:
    assert chosen(4, chooses_micro_batch=False, chooses_recompute=False) == (16_384, False)
    assert chosen(4, chooses_recompute=False) == (2_048, False)
    assert chosen(4, chooses_micro_batch=False) == (16_384, True)


def test_a_micro_batch_holds_the_longest_sample_and_vllm_has_its_share() -> None:
    assert chosen(141, sample_length=40_000)[0] == 40_000
    assert chosen(6, sample_length=3_000)[0] == 3_000
    beside = chosen(80, sampler=VllmMemory(2, 64, 0.6, sleeps=False))
    assert beside != chosen(80) and beside == chosen(80 * (1 - 0.6))


@given(st.floats(1, 200), st.booleans(), st.booleans())
def test_the_choice_fits_if_any_does(gib: float, micro_batch: bool, recompute: bool) -> None:
    load = replace(LOAD, chooses_micro_batch=micro_batch, chooses_recompute=recompute)
    choice = fit(load, gib * GIB)
    least = fit(load, 0)
    if training_bytes(least) <= FILLED * gib * GIB:
        assert training_bytes(choice) <= FILLED * gib * GIB
    else:
        assert choice == least


RECIPE = {
    "data": {"type": "lab", "train": 8, "validation": 2, "test": 2},
    "critic": {"type": "oracle"},
    "context": {"type": "step_aligned"},
    "sampling": {"max_tokens": 24, "batch_size": 8},
    "train": {"steps": 2, "problems_per_step": 4, "group_size": 2, "checkpoint_every": 1},
    "evaluation": {"every": 2, "validation_k": 1, "test": False},
}


def recipe() -> Recipe:
    return validate(Recipe, RECIPE)


def free(monkeypatch: pytest.MonkeyPatch, tokens: int, *, recompute: bool = False) -> None:
    """Leave just the memory that training with this micro-batch needs."""
    load = device_load(recipe(), measure_offline(recipe()))
    assert load is not None
    needed = training_bytes(replace(load, micro_batch_tokens=tokens, recompute=recompute))
    available = int(needed / FILLED) + 1
    monkeypatch.setattr(device_load_module, "free_memory", lambda _: available)


def test_build_uses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    free(monkeypatch, 4_096)
    assert build(recipe()).components.micro_batch_tokens == 4_096
    free(monkeypatch, 1)
    built = build(recipe())
    assert built.components.micro_batch_tokens == 2_048
    modules = built.components.policy.model.modules()
    assert any(getattr(module, "gradient_checkpointing", False) for module in modules)


def test_on_a_cpu_a_micro_batch_of_the_recipe_is_not_recomputed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What its prompts share would be run for each of them then, and is most of some micro-batches."""
    free(monkeypatch, 1)
    named = validate(Recipe, merge(RECIPE, {"train": {"micro_batch_tokens": 16_384}}))
    assert with_memory_choices(named).model.gradient_checkpointing is False
    assert with_memory_choices(recipe()).model.gradient_checkpointing is True
    on_gpu = device_load(named, replace(measure_offline(named), device="cuda"))
    assert on_gpu is not None and on_gpu.chooses_recompute


@pytest.mark.parametrize(("device", "tokens"), [("cpu", 16_384), ("cuda", 2_048)])
def test_a_model_of_unknown_size_fills_no_gpu(
    monkeypatch: pytest.MonkeyPatch, device: str, tokens: int
) -> None:
    monkeypatch.setattr(device_load_module, "choose_device", lambda _: torch.device(device))
    monkeypatch.setattr(device_load_module, "cached_config", lambda *_, **__: None)
    of_nobody = validate(Recipe, merge(RECIPE, {"model": {"path": "nobody/unknown"}}))
    assert with_memory_choices(of_nobody).train.micro_batch_tokens == tokens


def test_a_resume_goes_on_as_the_run_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free(monkeypatch, 4_096)
    run_to_end(recipe(), tmp_path / "whole")
    stopped = train(recipe(), tmp_path / "stopped")
    next(row for row in stopped if row["kind"] == "step")
    stopped.close()
    environment = json.loads((tmp_path / "stopped" / "environment.json").read_text())
    assert (environment["micro_batch_tokens"], environment["gradient_checkpointing"]) == (
        4_096,
        False,
    )
    free(monkeypatch, 1)
    splits = []

    def collated(*args: Any, micro_batch_tokens: int, **named: Any) -> list[Batch]:
        splits.append(micro_batch_tokens)
        return collate(*args, micro_batch_tokens=micro_batch_tokens, **named)

    monkeypatch.setattr(step, "collate", collated)
    run_to_end(recipe(), tmp_path / "stopped")
    assert set(splits) == {4_096}
    models = [tmp_path / run / "model" / "model.safetensors" for run in ("whole", "stopped")]
    assert models[0].read_bytes() == models[1].read_bytes()
