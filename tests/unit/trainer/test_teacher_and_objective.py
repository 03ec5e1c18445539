"""Which teacher scores in training, and which objectives a recipe may name."""

from __future__ import annotations

from typing import Any

import pytest

from selfteach.config.recipe import Recipe
from selfteach.errors import RecipeError
from selfteach.models.teacher import EmaTeacher, InitialTeacher, LiveTeacher
from selfteach.trainer.build import build, build_objective

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
