"""The token budget of a recipe equals counts by hand."""

from __future__ import annotations

import pytest

from selfteach.commands.check.tokens import Lengths, Tokens, plus, step_cost, step_tokens
from selfteach.config.recipe import Recipe
from selfteach.config.schema import merge, validate

BASE = {
    "sampling": {"max_tokens": 100},
    "train": {"problems_per_step": 3, "group_size": 4},
    "context": {"type": "reference"},
}
COUNTED = Lengths(500, longest_prompt=60, mean_prompt=50.0, mean_reference=70.0, critic_template=10)
ENDPOINT = {
    "type": "endpoint", "base_url": "http://x", "model": "m", "max_tokens": 1000, "max_attempts": 2,
    "price_prompt": 2.0, "price_completion": 8.0,
}  # fmt: skip


def recipe(**changes: object) -> Recipe:
    return validate(Recipe, merge(BASE, changes), where="test")


def rows(lengths: Lengths = COUNTED, **changes: object) -> dict[str, tuple[int, int | None]]:
    return {r.name: (r.at_most, r.expected) for r in step_tokens(recipe(**changes), lengths)}


def test_distillation_counts_equal_those_by_hand() -> None:
    assert rows() == {
        "prompts sampled from": (3 * 60, 3 * 50),
        "sampled": (12 * 100, None),
        "scored by the student": (12 * 160, 12 * 150),
        "scored by the teacher": (12 * 500, 12 * (50 + 70 + 100)),
    }


def test_without_lengths_there_is_no_expected_value() -> None:
    counts = rows(Lengths(500))
    assert counts["scored by the student"] == (12 * (1024 + 100), None)
    assert all(expected is None for _, expected in counts.values())
    assert plus(1, None) is None and plus(1, 2.5) == 3.5


def test_grpo_counts_teacher_tokens_only_with_a_kl_penalty() -> None:
    grpo = {"context": {"type": "none"}, "objective": {"type": "grpo"}}
    assert "scored by the teacher" not in rows(**grpo)
    penalised = merge(grpo, {"objective": {"kl_coef": 0.1}})
    assert rows(**penalised)["scored by the teacher"] == (12 * 160, 12 * 150)


def test_more_iterations_and_a_trust_region_teacher_multiply_the_counts() -> None:
    counts = rows(train={"num_iterations": 2}, teacher={"type": "trust_region"})
    assert counts["scored by the student"][0] == 2 * 12 * 160
    assert counts["scored by the teacher"][0] == 2 * 2 * 12 * 500


@pytest.mark.parametrize("sees", [False, True])
def test_critic_counts_equal_those_by_hand(sees: bool) -> None:
    critic = {**ENDPOINT, "sees_reference": sees}
    critiqued = recipe(context={"type": "step_aligned"}, critic=critic)
    counts = step_tokens(critiqued, COUNTED)
    at_most, expected = (500, 70) if sees else (0, 0)
    read = 2 * 12 * (10 + 60 + 100 + at_most)
    assert counts[-2:] == [
        Tokens("read by the critic", read, 12 * (50 + 100 + 10 + expected)),
        Tokens("written by the critic", 2 * 12 * 1000),
    ]
    assert counts[-3].expected == 12 * (50 + 100 + 100), "a trace is as long as the rollout"
    assert step_cost(critiqued, counts) == pytest.approx((2 * read + 8 * 24_000) / 1e6)
    assert step_cost(recipe(), step_tokens(recipe(), COUNTED)) == 0


def test_further_rounds_are_in_the_bounds() -> None:
    grpo = {"critic": None, "context": {"type": "none"}, "objective": {"type": "grpo"}}
    plain = rows(COUNTED, **grpo)
    dynamic = rows(COUNTED, **grpo, sampling={"dynamic_rounds": 3})
    for name in ("prompts sampled from", "sampled"):
        assert dynamic[name] == (4 * plain[name][0], None)
    assert dynamic["scored by the student"] == plain["scored by the student"]
