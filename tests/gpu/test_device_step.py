"""A step on a device is the processor's step: same samples, same loss, same gradient."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from runs_on_device import ALIGNED, ARMS, HALF, learned, lessons_of, recipe

from selfteach.runtime.run_folder import RunFolder, result_of
from selfteach.trainer import step
from selfteach.trainer.build import build
from selfteach.trainer.loop import run_to_end

pytestmark = pytest.mark.gpu

FLOAT32 = 2e-4
"""Of a gradient's largest entry: sums of a few thousand float32 in another order."""


@pytest.mark.parametrize("arm", ARMS)
def test_loss_and_gradient_are_the_processors(arm: str, device: str) -> None:
    here, there = (build(recipe(where, ARMS[arm])) for where in ("cpu", device))
    for name, weight in here.components.policy.trainable.items():
        assert torch.equal(there.components.policy.trainable[name].cpu(), weight), name
        assert there.components.policy.trainable[name].device.type == device
    samples = lessons_of(here)
    if there.components.policy.has_adapters:  # a B of zeros would leave A without a gradient
        for name, weight in here.components.policy.trainable.items():
            torch.nn.init.normal_(weight, 0.0, 0.05)
            there.components.policy.trainable[name].data.copy_(weight)
    loss, gradients, said = learned(here, samples)
    own_loss, own_gradients, own_said = learned(there, samples)
    assert own_loss == pytest.approx(loss, rel=1e-4, abs=1e-6)
    assert own_gradients.keys() == gradients.keys()
    largest = max(float(g.abs().max()) for g in gradients.values())
    assert largest > 1e-6
    for name, expected in gradients.items():
        apart = float((own_gradients[name] - expected).abs().max())
        assert apart <= FLOAT32 * largest, name
    for told, expected in zip(own_said, said, strict=True):
        torch.testing.assert_close(told["logp"].cpu(), expected["logp"].cpu(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("arm", ["grpo", "reference", "step_aligned", "lora"])
def test_an_update_moves_the_weights_as_on_the_processor(arm: str, device: str) -> None:
    """AdamW's first step is about the sign of each gradient: entries near 0 may go either way."""
    here, there = (build(recipe(where, ARMS[arm])) for where in ("cpu", device))
    samples = lessons_of(here)
    before = {n: w.detach().clone() for n, w in here.components.policy.trainable.items()}
    said, own = (step.learn(built.components, samples) for built in (here, there))
    for name in ("loss", "grad_norm", "lr", "clip_fraction", "tokens_trained"):
        assert own[name] == pytest.approx(said[name], rel=1e-3, abs=1e-6), name
    apart = moved = entries = 0.0
    for name, weight in here.components.policy.trainable.items():
        other = there.components.policy.trainable[name].detach().cpu()
        apart += float((other - weight.detach()).abs().gt(0.1 * said["lr"]).sum())
        moved += float((weight.detach() - before[name]).abs().sum())
        entries += weight.numel()
    assert moved > 0 and apart < 0.01 * entries


@pytest.mark.parametrize(
    "arm", ["grpo", "reference", "step_aligned", "ema", "trust region", "lora"]
)
def test_a_run_goes_through(arm: str, device: str, tmp_path: Path) -> None:
    asked = recipe(device, ARMS[arm])
    run_to_end(asked, tmp_path)
    rows = RunFolder(tmp_path).metrics()
    steps = [row for row in rows if row["kind"] == "step"]
    assert [row["step"] for row in steps] == [1, 2, 3]
    assert all(row["mismatch_max"] < 1e-3 for row in steps), "engine and trainer agree"
    assert all(row["nonfinite_updates"] == 0 for row in steps)
    assert any(row["grad_norm"] > 0 for row in steps)
    assert {row["kind"] for row in rows} == {"step", "validation", "test"}
    assert result_of(tmp_path)["budget"]["rollouts_sampled"] == 3 * 16
    assert list((tmp_path / "model").glob("*model.safetensors"))


@pytest.mark.parametrize("half", HALF)
@pytest.mark.parametrize("arm", ["grpo, penalty", "step_aligned", "ema", "trust region"])
def test_half_precision_is_near_the_processors_float32(half: str, arm: str, device: str) -> None:
    exact = build(recipe("cpu", ARMS[arm]))
    there = build(recipe(device, ARMS[arm], HALF[half]))
    samples = lessons_of(exact)
    loss, gradients, _ = learned(exact, samples)
    own_loss, own, _ = learned(there, samples)
    if "lora" in half:  # other weights train: only that it is a gradient
        assert own and all(torch.isfinite(g).all() for g in own.values())
    else:
        pairs = [(own[name].float().flatten(), g.flatten()) for name, g in gradients.items()]
        a, b = (torch.cat(side) for side in zip(*pairs, strict=True))
        assert torch.cosine_similarity(a, b, dim=0) > 0.95
    assert own_loss == pytest.approx(loss, rel=0.1, abs=0.02)


@pytest.mark.parametrize("half", HALF)
def test_a_run_in_half_precision_goes_through(half: str, device: str, tmp_path: Path) -> None:
    run_to_end(recipe(device, ALIGNED, HALF[half]), tmp_path)
    steps = [row for row in RunFolder(tmp_path).metrics() if row["kind"] == "step"]
    assert len(steps) == 3 and all(row["grad_norm"] > 0 for row in steps)
    assert all(row["mismatch_mean"] < 0.05 for row in steps)


def test_sampling_beside_learning_goes_through(device: str, tmp_path: Path) -> None:
    """A copy of the weights answers in a thread of its own while the policy learns."""
    beside = {
        "sampling": {"separate_copy": True},
        "train": {"staleness": 1},
        "objective": {"importance_cap": 2.0},
    }
    run_to_end(recipe(device, ALIGNED, beside), tmp_path)
    steps = [row for row in RunFolder(tmp_path).metrics() if row["kind"] == "step"]
    assert len(steps) == 3 and steps[0]["mismatch_max"] < 1e-3
    assert steps[2]["mismatch_max"] > 0, "answers of older weights"
