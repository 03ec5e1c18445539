"""What is built from a recipe: the teacher, the objective, and the weights that train."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from selfteach.config.recipe import Recipe
from selfteach.errors import RecipeError
from selfteach.models.teacher import EmaTeacher, InitialTeacher, LiveTeacher
from selfteach.trainer.build import build
from selfteach.trainer.build_objective import build_objective
from selfteach.types import Sequences

LAB: dict[str, Any] = {
    "model": {"path": "lab:two_styles"},
    "data": {"type": "lab", "train": 2, "validation": 1, "test": 1},
    "critic": {"type": "oracle"},
    "context": {"type": "step_aligned"},
}
GRPO: dict[str, Any] = {"context": {"type": "none"}, "critic": False}


def recipe(**sections: Any) -> Recipe:
    return Recipe.model_validate({**LAB, **sections})


@pytest.mark.parametrize("teacher", [{"type": "live"}, {"type": "ema", "rate": 0.1}])
def test_grpos_penalty_is_towards_the_initial_policy_whatever_the_teacher(teacher: dict) -> None:
    penalised = recipe(**GRPO, teacher=teacher, objective={"type": "grpo", "kl_coef": 0.1})
    assert isinstance(build(penalised).components.teacher, InitialTeacher)
    plain = recipe(**GRPO, teacher=teacher, objective={"type": "grpo"})
    assert isinstance(build(plain).components.teacher, LiveTeacher | EmaTeacher)
    distilled = recipe(teacher=teacher)
    assert isinstance(build(distilled).components.teacher, LiveTeacher | EmaTeacher)


def test_bfloat16_weights_that_all_train_are_kept_in_float32_and_move() -> None:
    half = {"model": {**LAB["model"], "weights_dtype": "bfloat16"}}
    built = build(recipe(**half, optimizer={"lr": 5e-6}, teacher={"type": "ema", "rate": 0.1}))
    policy = built.components.policy
    before = {name: param.detach().clone() for name, param in policy.trainable.items()}
    for _ in range(10):
        for param in policy.trainable.values():
            param.grad = torch.full_like(param, 1e-3)
        policy.optimizer_step()
        built.components.teacher.update()
    for name, param in policy.trainable.items():
        assert param.dtype == torch.float32, name
        assert policy.optimizer.state[param]["exp_avg_sq"].dtype == torch.float32
        moved = ((param - before[name]) + 5e-5).abs() < 2e-5  # ten updates of the rate
        assert moved.float().mean() > 0.99, name
    average = built.components.teacher.state()
    assert all(not torch.equal(average[name], before[name]) for name in before)
    prompt = torch.tensor([[1, 2, 3]])
    sequences = Sequences(prompt, torch.zeros(1, dtype=torch.long), torch.tensor([2]))
    ((hidden, _, _),) = policy.score(sequences).terms
    assert hidden.dtype == torch.bfloat16, "matmuls are in the recipe's dtype"


def test_frozen_weights_keep_the_recipes_dtype() -> None:
    model = {**LAB["model"], "weights_dtype": "bfloat16"}
    adapted = build(recipe(model={**model, "lora": {"rank": 2}})).components.policy.model
    dtypes = {name: param.dtype for name, param in adapted.named_parameters()}
    assert {d for n, d in dtypes.items() if "lora" in n} == {torch.float32}
    assert {d for n, d in dtypes.items() if "lora" not in n} == {torch.bfloat16}
    untrained = build(recipe(model=model, train={"steps": 0})).components.policy.model
    assert {param.dtype for param in untrained.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("train", [{"num_iterations": 2}, {"staleness": 1}])
def test_a_sampled_token_loss_needs_importance_weights_for_an_older_policys_tokens(
    train: dict,
) -> None:
    sampled = {"divergence": "reverse_kl", "support": "sampled"}
    with pytest.raises(RecipeError, match=r"older policy's.*importance_cap"):
        build_objective(recipe(objective=sampled, train=train))
    build_objective(recipe(objective={**sampled, "importance_cap": 2.0}, train=train))
    build_objective(recipe(objective={"divergence": "reverse_kl"}, train=train))
    hybrid = {"type": "hybrid", "distillation": sampled}
    with pytest.raises(RecipeError, match="older policy's"):
        build_objective(recipe(objective=hybrid, train=train))
