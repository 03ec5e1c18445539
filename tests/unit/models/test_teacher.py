"""Self-teachers score with frozen, current, averaged or mixed weights, and restore the policy's."""

from __future__ import annotations

import pytest
import torch

from selfteach.config.recipe import Recipe
from selfteach.config.teacher_section import (
    EmaTeacherConfig,
    InitialTeacherConfig,
    LiveTeacherConfig,
    TrustRegionTeacherConfig,
)
from selfteach.models.policy import Policy
from selfteach.models.sequences import sequences
from selfteach.trainer.build import build, build_teacher

SIDE = sequences([[1, 4, 5], [1, 6]], [[7, 8, 2], [9, 2]], 0)
ALL = slice(None)


def policy_of(**model: object) -> Policy:
    return build(
        Recipe.model_validate(
            {
                "model": model,
                "data": {"type": "lab", "train": 1, "validation": 1, "test": 1},
                "train": {"steps": 0},
            }
        )
    ).components.policy


@pytest.fixture(params=["full", "lora"])
def policy(request: pytest.FixtureRequest) -> Policy:
    return policy_of(**({"lora": {"rank": 4, "alpha": 8}} if request.param == "lora" else {}))


@torch.no_grad()
def logits(policy: Policy) -> torch.Tensor:
    return policy.score(SIDE).logits(ALL)


@torch.no_grad()
def move(policy: Policy, amount: float = 0.02) -> None:
    generator = torch.Generator().manual_seed(0)
    for param in policy.trainable.values():
        param.add_(amount * torch.randn(param.shape, generator=generator))


def test_the_initial_teacher_does_not_change(policy: Policy) -> None:
    teacher, before = build_teacher(InitialTeacherConfig(), policy), logits(policy)
    move(policy)
    teacher.update()
    assert not torch.allclose(logits(policy), before)
    assert torch.equal(teacher.score(SIDE).logits(ALL), before)


def test_adapters_off_is_the_plain_model() -> None:
    plain, adapted = policy_of(), policy_of(lora={"rank": 4, "alpha": 8})
    teacher = build_teacher(InitialTeacherConfig(), adapted)
    move(adapted)
    assert teacher.state() == {}
    assert torch.equal(teacher.score(SIDE).logits(ALL), logits(plain))


def test_the_live_teacher_follows_the_policy(policy: Policy) -> None:
    teacher = build_teacher(LiveTeacherConfig(type="live"), policy)
    move(policy)
    assert torch.equal(teacher.score(SIDE).logits(ALL), logits(policy))


def test_ema_moves_by_its_rate(policy: Policy) -> None:
    teacher = build_teacher(EmaTeacherConfig(type="ema", rate=0.25), policy)
    name, param = next(iter(policy.trainable.items()))
    start = param.detach().clone()
    with torch.no_grad():
        param.add_(1.0)
    teacher.update()  # a quarter of the way
    assert torch.allclose(teacher.state()[name], start + 0.25)
    teacher.update()  # a quarter of what is left: 1 - .75^2
    assert torch.allclose(teacher.state()[name], start + 0.4375)


def test_trust_region_mixes_logits(policy: Policy) -> None:
    before = logits(policy)
    teacher = build_teacher(TrustRegionTeacherConfig(type="trust_region", student_mix=0.3), policy)
    move(policy)
    mixed = 0.7 * before + 0.3 * logits(policy)
    assert torch.allclose(teacher.score(SIDE).logits(ALL), mixed, atol=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        InitialTeacherConfig(),
        EmaTeacherConfig(type="ema"),
        TrustRegionTeacherConfig(type="trust_region"),
    ],
)
def test_state_survives_a_round_trip(config: object, policy: Policy) -> None:
    teacher = build_teacher(config, policy)  # type: ignore[arg-type]
    move(policy)
    teacher.update()
    saved = {name: value.clone() for name, value in teacher.state().items()}
    expected = teacher.score(SIDE).logits(ALL)
    other = build_teacher(config, policy)  # type: ignore[arg-type]
    other.load_state(saved)
    assert torch.equal(other.score(SIDE).logits(ALL), expected)


@pytest.mark.parametrize(
    "config",
    [
        InitialTeacherConfig(),
        EmaTeacherConfig(type="ema", rate=0.1),
        TrustRegionTeacherConfig(type="trust_region", student_mix=0.0),
    ],
)
def test_scores_read_after_the_swap_are_still_the_teachers(config: object) -> None:
    policy = policy_of()
    teacher, before = build_teacher(config, policy), logits(policy)  # type: ignore[arg-type]
    move(policy)
    scores = teacher.score(SIDE)
    move(policy)
    assert torch.equal(scores.logits(ALL), before), "the head too must be the teacher's"


def test_weights_are_restored_after_an_error(policy: Policy) -> None:
    before = {name: param.data_ptr() for name, param in policy.trainable.items()}
    other = {name: param.detach() * 0 for name, param in policy.trainable.items()}
    with pytest.raises(ZeroDivisionError), policy.weights_swapped(other):
        raise ZeroDivisionError
    assert {name: param.data_ptr() for name, param in policy.trainable.items()} == before


def test_a_teacher_gives_no_gradient(policy: Policy) -> None:
    scores = build_teacher(InitialTeacherConfig(), policy).score(SIDE)
    assert not scores.logits(ALL).requires_grad
