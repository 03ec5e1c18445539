"""Computing a shared prefix once changes neither rollouts, nor scores, nor gradients."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

from selfteach.models import prefix_cache
from selfteach.models.policy import Policy, Schedule
from selfteach.models.prefix_cache import MIN_SHARED, shared_length
from selfteach.models.sequences import sequences
from selfteach.models.trainable_model import add_adapters, recompute_activations
from selfteach.prompts.renderer import Renderer
from selfteach.rollout.transformers_engine import TransformersEngine
from selfteach.types import Problem, Sampling

COMMON = [3 + i % 7 for i in range(MIN_SHARED)]
PROMPTS = [[*COMMON, 5, 9], [*COMMON, 4], [*COMMON, 4, 11, 12, 6]]
ANSWERS = [[7, 8, 2], [9, 2], [6, 5, 4, 3, 2]]


class _Fixed(Renderer):
    """Renders the prompts above for any problem."""

    def __init__(self) -> None:
        pass

    def solver_prompt(self, problem: Problem) -> tuple[int, ...]:
        return tuple(PROMPTS[int(problem.id)])

    def decode(self, token_ids: Sequence[int]) -> str:
        return str(token_ids)


def test_hand_made_lengths() -> None:
    assert shared_length(PROMPTS) == MIN_SHARED
    assert shared_length(PROMPTS[1:]) == MIN_SHARED + 0  # the 4 they share is the last of one
    assert shared_length(PROMPTS[:1]) == 0
    assert shared_length([[1, *COMMON], COMMON]) == 0
    assert shared_length([COMMON, COMMON]) == 0  # one token short once the last is left out
    assert shared_length([[*COMMON, 1], [*COMMON, 1]]) == MIN_SHARED


@given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=40), min_size=2, max_size=4))
def test_the_shared_prefix_is_equal_and_leaves_every_prompt_a_token(tails) -> None:
    prompts = [[*COMMON, *tail] for tail in tails]
    shared = shared_length(prompts)
    assert shared >= MIN_SHARED
    assert all(p[:shared] == prompts[0][:shared] and len(p) > shared for p in prompts)
    longer = {tuple(p[: shared + 1]) for p in prompts}
    assert len(longer) > 1 or any(len(p) == shared + 1 for p in prompts)


@pytest.mark.parametrize("lora", [False, True])
def test_scores_and_gradients_are_those_of_the_plain_pass(
    tiny_llama: LlamaForCausalLM, lora: bool
) -> None:
    model = tiny_llama.double()
    if lora:
        model = add_adapters(
            model, rank=2, alpha=4.0, dropout=0.0, targets=("q_proj", "v_proj"), seed=0
        )
        for name, weight in model.named_parameters():
            if "lora_B" in name:  # begins at zero, where no gradient reaches A
                weight.data.normal_(generator=torch.Generator().manual_seed(2))
    policy = Policy(model, Schedule(1e-3))
    side = sequences(PROMPTS, ANSWERS, pad_id=0)
    assert side.shared == MIN_SHARED
    results = []
    assert side.tree is not None
    for way in (side, dataclasses.replace(side, tree=None), None):
        scores = policy.score(way or dataclasses.replace(side, shared=0, tree=None))
        logits = scores.logits(slice(None))
        (logits.sin() * torch.arange(logits.shape[1])).sum().backward()
        weights = policy.trainable.items()
        grads = {name: weight.grad for name, weight in weights if weight.grad is not None}
        assert len(grads) == len(policy.trainable)
        policy.optimizer.zero_grad(set_to_none=True)
        results.append((logits.detach(), grads))
    *others, (plain, plain_grads) = results
    # Llama's norms and rotations are in float32 whatever the weights are.
    for once, once_grads in others:
        torch.testing.assert_close(once, plain, rtol=0, atol=1e-6 * float(plain.abs().max()))
        assert len(once_grads) > 4 and all(grad.abs().max() > 0 for grad in once_grads.values())
        for name, grad in once_grads.items():
            close = 1e-5 * float(grad.abs().max())
            torch.testing.assert_close(grad, plain_grads[name], rtol=0, atol=close)


def test_gradient_checkpointing_disables_the_shared_prefix(
    tiny_llama: LlamaForCausalLM, monkeypatch
) -> None:
    plain = Policy(tiny_llama, Schedule(1e-3))
    side = sequences(PROMPTS, ANSWERS, pad_id=0)
    with torch.no_grad():
        expected = plain.score(side).logits(slice(None))
    recompute_activations(tiny_llama)
    monkeypatch.setattr(prefix_cache, "fill", None)
    policy = Policy(tiny_llama, Schedule(1e-3))
    torch.testing.assert_close(policy.score(side).logits(slice(None)).detach(), expected)


@pytest.mark.parametrize("threshold", [1, 1000])
def test_answers_are_the_same_whether_the_prefix_is_shared_or_not(
    tiny_llama: LlamaForCausalLM, monkeypatch, threshold: int
) -> None:
    def answers(least: int):
        monkeypatch.setattr(prefix_cache, "MIN_SHARED", least)
        engine = TransformersEngine(tiny_llama, _Fixed(), end_ids=[2], pad_id=0, max_length=64)
        problems = [Problem(str(i), "", "") for i in range(len(PROMPTS))]
        return engine.generate(problems, Sampling(3, 1.0, 12, 0))

    for a, b in zip(answers(threshold), answers(MIN_SHARED), strict=True):
        assert a.token_ids == b.token_ids
        assert a.logps == pytest.approx(b.logps, abs=1e-5)
