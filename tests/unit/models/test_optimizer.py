"""The learning rate's schedule, weight decay, and what an update without a gradient does."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaForCausalLM, get_scheduler

from selfteach.models.policy import Policy, Schedule


def test_a_linear_decay_begins_at_the_named_rate_after_the_warm_up() -> None:
    schedule = Schedule(1.0, warmup_steps=4, decay="linear", total_steps=10)
    rates = [schedule(update) for update in range(11)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4:] == pytest.approx([1.0, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0.0])
    assert max(rates) == 1.0


def test_a_cosine_decay_by_hand() -> None:
    schedule = Schedule(2.0, warmup_steps=2, decay="cosine", total_steps=6)
    half = 2**-0.5
    want = [1.0, 2.0, 2.0, 1 + half, 1.0, 1 - half, 0.0]
    assert [schedule(update) for update in range(7)] == pytest.approx(want)


@pytest.mark.parametrize("warmup", [0, 3])
@pytest.mark.parametrize("decay", ["linear", "cosine"])
def test_decays_are_those_of_transformers_after_the_warm_up(decay: str, warmup: int) -> None:
    schedule = Schedule(1.0, warmup, decay, total_steps=20)  # type: ignore[arg-type]
    adam = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=1.0)
    theirs = get_scheduler(decay, adam, num_warmup_steps=warmup, num_training_steps=20)
    (rate,) = theirs.lr_lambdas  # pyright: ignore[reportAttributeAccessIssue]
    for update in range(warmup, 21):
        assert schedule(update) == pytest.approx(rate(update), abs=1e-12)


@pytest.mark.parametrize("warmup", [0, 3, 20])
def test_schedules_without_decay_or_warm_up(warmup: int) -> None:
    constant = Schedule(2.0, warmup_steps=warmup, total_steps=10)
    assert constant(10) == pytest.approx(min(1.0, 11 / max(1, warmup)) * 2.0)
    linear = Schedule(2.0, warmup_steps=warmup, decay="linear", total_steps=10)
    assert all(0 <= linear(update) <= 2.0 for update in range(30))
    assert Schedule(2.0, decay="linear", total_steps=10)(5) == pytest.approx(1.0)


def test_matrices_decay_and_norms_and_biases_do_not(tiny_llama: LlamaForCausalLM) -> None:
    policy = Policy(tiny_llama, Schedule(0.1), weight_decay=0.5)
    before = {name: param.detach().clone() for name, param in policy.trainable.items()}
    for param in policy.trainable.values():
        param.grad = torch.zeros_like(param)
    # A gradient of nothing but zeros takes no update.
    unlike = "model.norm.weight"
    policy.trainable[unlike].grad = torch.ones_like(policy.trainable[unlike])
    policy.optimizer_step()
    for name, param in policy.trainable.items():
        if name == unlike:
            continue
        factor = 1 - 0.1 * 0.5 if param.ndim >= 2 else 1.0
        torch.testing.assert_close(param.detach(), before[name] * factor, msg=name)
    assert any(param.ndim < 2 for param in policy.trainable.values())
