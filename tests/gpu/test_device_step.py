"""A step on a device equals the step on a CPU: same samples, same loss, same gradient."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from runs_on_device import (
    ALIGNED,
    ARMS,
    LOW_PRECISION,
    loss_and_gradients,
    recipe,
    training_samples,
)

from selfteach.runtime.run_folder import RunFolder, load_result
from selfteach.trainer import step
from selfteach.trainer.build import build
from selfteach.trainer.loop import run_to_end

pytestmark = pytest.mark.gpu

FLOAT32 = 2e-4
"""Tolerance relative to a gradient's largest entry: float32 sums in another order."""


@pytest.mark.parametrize("arm", ARMS)
def test_loss_and_gradient_equal_those_on_a_cpu(arm: str, device: str) -> None:
    on_cpu, on_device = (build(recipe(where, ARMS[arm])) for where in ("cpu", device))
    for name, weight in on_cpu.components.policy.trainable.items():
        assert torch.equal(on_device.components.policy.trainable[name].cpu(), weight), name
        assert on_device.components.policy.trainable[name].device.type == device
    samples = training_samples(on_cpu)
    if on_device.components.policy.has_adapters:  # a B of zeros would leave A without a gradient
        for name, weight in on_cpu.components.policy.trainable.items():
            torch.nn.init.normal_(weight, 0.0, 0.05)
            on_device.components.policy.trainable[name].data.copy_(weight)
    loss, gradients, stats = loss_and_gradients(on_cpu, samples)
    device_loss, device_gradients, device_stats = loss_and_gradients(on_device, samples)
    assert device_loss == pytest.approx(loss, rel=1e-4, abs=1e-6)
    assert device_gradients.keys() == gradients.keys()
    largest = max(float(g.abs().max()) for g in gradients.values())
    assert largest > 1e-6
    for name, expected in gradients.items():
        difference = float((device_gradients[name] - expected).abs().max())
        assert difference <= FLOAT32 * largest, name
    for ours, expected in zip(device_stats, stats, strict=True):
        torch.testing.assert_close(ours["logp"].cpu(), expected["logp"].cpu(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("arm", ["grpo", "reference", "step_aligned", "lora"])
def test_an_update_changes_the_weights_as_on_a_cpu(arm: str, device: str) -> None:
    """AdamW's first step is about the sign of each gradient: entries near 0 may go either way."""
    on_cpu, on_device = (build(recipe(where, ARMS[arm])) for where in ("cpu", device))
    samples = training_samples(on_cpu)
    before = {n: w.detach().clone() for n, w in on_cpu.components.policy.trainable.items()}
    cpu_metrics, device_metrics = (
        step.learn(built.components, samples) for built in (on_cpu, on_device)
    )
    for name in ("loss", "grad_norm", "lr", "clip_fraction", "tokens_trained"):
        assert device_metrics[name] == pytest.approx(cpu_metrics[name], rel=1e-3, abs=1e-6), name
    difference = moved = entries = 0.0
    for name, weight in on_cpu.components.policy.trainable.items():
        other = on_device.components.policy.trainable[name].detach().cpu()
        difference += float((other - weight.detach()).abs().gt(0.1 * cpu_metrics["lr"]).sum())
        moved += float((weight.detach() - before[name]).abs().sum())
        entries += weight.numel()
    assert moved > 0 and difference < 0.01 * entries


@pytest.mark.parametrize(
    "arm", ["grpo", "reference", "step_aligned", "ema", "trust region", "lora"]
)
def test_a_run_completes(arm: str, device: str, tmp_path: Path) -> None:
    run_recipe = recipe(device, ARMS[arm])
    run_to_end(run_recipe, tmp_path)
    rows = RunFolder(tmp_path).metrics()
    steps = [row for row in rows if row["kind"] == "step"]
    assert [row["step"] for row in steps] == [1, 2, 3]
    assert all(row["mismatch_max"] < 1e-3 for row in steps), "engine and trainer agree"
    assert all(row["nonfinite_updates"] == 0 for row in steps)
    assert any(row["grad_norm"] > 0 for row in steps)
    assert {row["kind"] for row in rows} == {"step", "validation", "test"}
    assert load_result(tmp_path)["budget"]["rollouts_sampled"] == 3 * 16
    assert list((tmp_path / "model").glob("*model.safetensors"))


@pytest.mark.parametrize("precision", LOW_PRECISION)
@pytest.mark.parametrize("arm", ["grpo, penalty", "step_aligned", "ema", "trust region"])
def test_low_precision_is_near_float32_on_a_cpu(precision: str, arm: str, device: str) -> None:
    exact = build(recipe("cpu", ARMS[arm]))
    on_device = build(recipe(device, ARMS[arm], LOW_PRECISION[precision]))
    samples = training_samples(exact)
    loss, gradients, _ = loss_and_gradients(exact, samples)
    device_loss, device_gradients, _ = loss_and_gradients(on_device, samples)
    if "lora" in precision:  # other weights train: only that it is a gradient
        assert device_gradients
        assert all(torch.isfinite(g).all() for g in device_gradients.values())
    else:
        pairs = [
            (device_gradients[name].float().flatten(), g.flatten()) for name, g in gradients.items()
        ]
        a, b = (torch.cat(side) for side in zip(*pairs, strict=True))
        assert torch.cosine_similarity(a, b, dim=0) > 0.95
    assert device_loss == pytest.approx(loss, rel=0.1, abs=0.02)


@pytest.mark.parametrize("precision", LOW_PRECISION)
def test_a_run_in_low_precision_completes(precision: str, device: str, tmp_path: Path) -> None:
    run_to_end(recipe(device, ALIGNED, LOW_PRECISION[precision]), tmp_path)
    steps = [row for row in RunFolder(tmp_path).metrics() if row["kind"] == "step"]
    assert len(steps) == 3 and all(row["grad_norm"] > 0 for row in steps)
    assert all(row["mismatch_mean"] < 0.05 for row in steps)


def test_a_run_that_samples_while_it_trains_completes(device: str, tmp_path: Path) -> None:
    """A copy of the weights samples in another thread while the policy trains."""
    change = {
        "sampling": {"separate_copy": True},
        "train": {"staleness": 1},
        "objective": {"importance_cap": 2.0},
    }
    run_to_end(recipe(device, ALIGNED, change), tmp_path)
    steps = [row for row in RunFolder(tmp_path).metrics() if row["kind"] == "step"]
    assert len(steps) == 3 and steps[0]["mismatch_max"] < 1e-3
    assert steps[2]["mismatch_max"] > 0, "rollouts of older weights"
