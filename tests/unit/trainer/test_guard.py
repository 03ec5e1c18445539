"""A guard stops runs that learn nothing and acts beyond bounds; a replay finds it as it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfteach.config.guard_section import GuardConfig
from selfteach.config.recipe import Recipe
from selfteach.config.schema import validate
from selfteach.errors import RecipeError
from selfteach.trainer.guard import Guard, GuardEvent, learned_nothing, why_idle

COLLAPSE = Path(__file__).parents[2] / "fixtures" / "collapse" / "live_teacher.jsonl"
HEALTHY: dict[str, Any] = {
    "kind": "step", "optimizer_steps": 1, "grad_norm": 0.3, "correct": 0.4, "length": 50.0,
    "entropy": 0.8, "truncated": 0.0, "repetition": 0.05, "formatted": 1.0,
}  # fmt: skip
IDLE = HEALTHY | {"optimizer_steps": 0, "grad_norm": 0.0}


def observed(config: GuardConfig, *rows: dict[str, Any]) -> tuple[Guard, list[GuardEvent]]:
    """Show a guard rows of steps 1, 2, …; return it with its events."""
    guard, events = Guard(config), list[GuardEvent]()
    for step, row in enumerate(rows, start=1):
        events += guard.observe({**row, "step": step})
    return guard, events


def test_idle_steps_in_a_row_stop_a_run_and_name_the_reason() -> None:
    unusable = IDLE | {"dropped": 1.0, "dropped/malformed": 1.0}
    _, events = observed(GuardConfig(), *[unusable] * 4, HEALTHY, *[unusable] * 5)
    (event,) = events
    assert (event.step, event.action) == (10, "stop")
    assert "100% of the rollouts had no usable feedback (malformed)" in event.text
    assert not observed(GuardConfig(idle_steps=0), *[IDLE] * 30)[1]


def test_nothing_to_learn_is_no_fault() -> None:
    assert not observed(GuardConfig(), *[IDLE | {"correct": 0.97}] * 20)[1]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (IDLE | {"truncated": 1.0}, "100% of the rollouts were cut at sampling.max_tokens"),
        (IDLE | {"formatted": 0.1}, "10% of the rollouts had the form of an answer"),
        (IDLE | {"correct": 0.0}, "no token was in the loss (0% of the rollouts are right"),
        (HEALTHY | {"grad_norm": 0.0}, "the teacher says what the student says"),
        (HEALTHY | {"grad_norm": 8.6e-7}, "the teacher says what the student says"),
    ],
)
def test_reasons(row: dict[str, Any], words: str) -> None:
    assert words in why_idle([row])
    assert learned_nothing([row, row]) and not learned_nothing([row, HEALTHY])


@pytest.mark.parametrize(
    ("bound", "metric", "value"),
    [
        ({"length": (0.5, 2.0)}, "length", 24.0),
        ({"length": (0.5, 2.0)}, "length", 101.0),
        ({"entropy": (0.25, 4.0)}, "entropy", 0.19),
        ({"entropy": (0.25, 4.0)}, "entropy", 3.3),
        ({"truncated": 0.2}, "truncated", 0.21),
        ({"repetition": 0.3}, "repetition", 0.31),
        ({"kl_initial": 0.5}, "kl_initial", 0.51),
        ({"reward": 0.6}, "correct", 0.23),
    ],
)
def test_each_bound_acts_on_the_mean_of_a_window(
    bound: dict[str, Any], metric: str, value: float
) -> None:
    start, beyond = [HEALTHY | {"kl_initial": 0.0}] * 3, [HEALTHY | {metric: value}] * 3
    for action in ("warn", "reduce_lr", "stop"):
        guard, events = observed(GuardConfig(**bound, action=action), *start, *beyond)
        (event,) = events  # the mean of three steps is beyond when all three are
        assert event.action == action and f"guard.{next(iter(bound))} = " in event.text
        assert guard.lr_factor == (0.5 if action == "reduce_lr" else 1.0)
    inside = HEALTHY | {metric: (HEALTHY | {"kl_initial": 0.0})[metric] * 1.05}
    assert not observed(GuardConfig(**bound), *start, *[inside] * 9)[1]


def test_a_lowered_rate_gets_a_window_to_help() -> None:
    config = GuardConfig(truncated=0.2, action="reduce_lr", lr_factor=0.1)
    guard, events = observed(config, *[HEALTHY | {"truncated": 1.0}] * 9)
    assert [event.step for event in events] == [3, 6, 9]
    assert guard.lr_factor == pytest.approx(1e-3)


@given(st.lists(st.sampled_from([HEALTHY, IDLE, HEALTHY | {"truncated": 1.0}]), max_size=30))
def test_a_replay_ends_in_the_same_state(rows: list[dict[str, Any]]) -> None:
    config = GuardConfig(truncated=0.4, action="reduce_lr", idle_steps=3)
    steps = [{**row, "step": step} for step, row in enumerate(rows, start=1)]
    whole, events = observed(config, *rows)
    for cut in range(len(rows) + 1):
        resumed = Guard(config)
        for row in steps[:cut]:
            resumed.observe(row)
        rest = [event for row in steps[cut:] for event in resumed.observe(row)]
        assert rest == [event for event in events if event.step > cut]
        assert resumed.lr_factor == whole.lr_factor


def test_the_collapse_of_a_live_teacher_is_stopped() -> None:
    """Uses the metrics of a run that collapsed; LOG.md (2026-11-29) has its command."""
    rows = [json.loads(line) for line in COLLAPSE.read_text(encoding="utf-8").splitlines()]
    steps = [row for row in rows if row["kind"] == "step"]
    # 94 % of the rollouts are right after 40 steps, none after 48; early steps are noisy.
    guard = Guard(GuardConfig(reward=0.5, window=8, action="stop"))
    events = [event for row in steps for event in guard.observe(row)]
    assert events[0].action == "stop" and 40 < events[0].step < 48
    assert not [event for row in steps[:40] for event in Guard(GuardConfig()).observe(row)]


def test_kl_from_the_initial_policy_needs_its_weights() -> None:
    values = {
        "guard": {"kl_initial": 0.5}, "teacher": {"type": "live"}, "context": {"type": "reference"},
    }  # fmt: skip
    with pytest.raises(RecipeError, match=r"guard\.kl_initial"):
        validate(Recipe, values, where="recipe")
    validate(Recipe, values | {"model": {"lora": {"rank": 2}}}, where="recipe")
    validate(Recipe, values | {"teacher": {"type": "initial"}}, where="recipe")


@pytest.mark.parametrize("bounds", [[0.5], [1.5, 2.0], [0.5, 0.9], [-1.0, 2.0]])
def test_factors_of_the_first_steps_surround_one(bounds: list[float]) -> None:
    with pytest.raises(RecipeError, match="length"):
        validate(Recipe, {"guard": {"length": bounds}}, where="recipe")
