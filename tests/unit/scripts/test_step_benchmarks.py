"""What the step's benchmarks rest on: the clock, micro-batches like TRL's, the budget of a phase."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import runs_on_device
import torch
from torch.autograd import DeviceType
from without_values import move_to_meta

from selfteach.models.policy import Policy
from selfteach.trainer.batching import collate
from selfteach.trainer.build import build
from selfteach.types import TokenWeights

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in (BENCHMARKS / "training", BENCHMARKS):
        monkeypatch.syspath_prepend(str(folder))


def test_the_phases_of_the_budget_run_on_the_policys_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import roofline

    built = build(runs_on_device.recipe("cpu", runs_on_device.REFERENCE))
    samples = runs_on_device.training_samples(built)
    phases = roofline.phases(built.components, samples, [sample.rollout for sample in samples])
    operations = {name: minimum.operations for name, (_, minimum) in phases.items()}
    assert operations["teacher, student, loss and backward"] > operations["teacher"] > 0
    move_to_meta(built, monkeypatch)  # where a batch that was left on the CPU cannot be used
    assert isinstance(built.components.policy, Policy)
    for call in roofline.training_calls(built.components, samples)[:2]:
        call()


def test_kernels_count_once() -> None:
    import roofline

    events: Any = [
        SimpleNamespace(self_device_time_total=2e6, device_type=kind, is_user_annotation=noted)
        for kind, noted in (
            (DeviceType.CPU, False), (DeviceType.CUDA, False), (DeviceType.CUDA, True),
        )
    ]  # fmt: skip
    assert roofline.seconds_of_kernels(events) == 2.0, "not of operators, nor of annotations"


@pytest.mark.parametrize("on_gpu", [True, False])
def test_whole_steps_on_a_gpu_wait_for_no_phase(
    on_gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import step_clock

    waits = list[str]()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: on_gpu)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits.append("wait"))
    clock = step_clock.Clock()
    for by_phase in [False] * 3 + [True] * step_clock.steps_by_phase():
        clock.by_phase = by_phase
        with clock("student"), clock("teacher"):
            pass
        assert len(waits) == (4 if by_phase else 0)
        clock.end(2.0 if by_phase else 1.0)
    medians = clock.medians()
    assert medians.pop("step") == 1.0 and medians.keys() == {"student", "teacher", "rest"}
    assert sum(medians.values()) == pytest.approx(2.0 if on_gpu else 1.0)


@pytest.mark.parametrize("kind, tokens", [("full", (6144, 18_432)), ("grpo", (2560, 8704))])
def test_micro_batches_hold_as_many_samples_as_trls(kind: str, tokens: tuple[int, int]) -> None:
    import dataclasses

    import random_models

    names = ("Qwen2.5-1.5B, random weights", "Qwen2.5-1.5B, 2,048 tokens")
    for name, limit in zip(names, tokens, strict=True):
        size = random_models.MODEL_SIZES[name]
        assert size.trl_tokens(with_teacher=kind == "full") == limit
        samples = random_models.samples_of(name)
        if kind == "grpo":
            samples = [dataclasses.replace(one, teacher_prompt_ids=None) for one in samples]
        weights = [TokenWeights((1.0,) * size.length)] * len(samples)
        batches = collate(samples, weights, pad_id=0, micro_batch_tokens=limit)
        rows = {len(batch.ids_N) // size.length for batch in batches}
        assert rows == {size.trl_batch} and len(batches) == size.rollouts // size.trl_batch


def test_on_a_gpu_the_last_step_of_each_trainer_is_by_phase(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import step_clock
    import trainers_compared

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(trainers_compared, "device_bytes", lambda: 0)
    clocks = [step_clock.Clock() for _ in range(3)]
    trl: Any = SimpleNamespace(
        clock=clocks[0], others=[SimpleNamespace(clock=clocks[2])], samples=[],
        ours=SimpleNamespace(clock=clocks[1], sample=list),
    )  # fmt: skip
    steps: Any = trainers_compared._Steps(trl)
    for number in range(3):
        state = SimpleNamespace(global_step=number, max_steps=3)
        steps.on_step_begin(None, state, None)
        assert [clock.by_phase for clock in clocks] == [number == 2] * 3
        steps.on_pre_optimizer_step(None, state, None)
        assert (steps._optimizer is not None) == (number == 2)
