"""GRPO's published forms: numbers by hand, and the slow obvious form of each."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from grpo_case import (
    CORRECT,
    FINISHED,
    FORMS,
    GROUPS,
    LENGTHS,
    LIMIT,
    OPTIONS,
    B,
    Case,
    case,
    ids_of,
    objective,
    our_loss,
    samples,
)
from torch import Tensor

from selfteach.losses.grpo import Grpo
from selfteach.losses.policy_gradient import (
    cispo_surrogate,
    clipped_surrogate,
    group_advantages,
    sequence_means,
)
from selfteach.models.lm_head import Head, Scores
from selfteach.models.sequences import sequences
from selfteach.types import Batch, CritiquedRollout, Verdict


def test_advantages_by_hand() -> None:
    rewards, groups = [1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0], list("aaaabbbb")
    # The batch's mean is 3/8, its variance (3 · 25/64 + 5 · 9/64) / 7 = 15/56.
    got = group_advantages(rewards, groups, scale_rewards="batch")
    std = math.sqrt(15 / 56) + 1e-4
    assert got == pytest.approx(
        [0.5 / std, -0.5 / std, -0.5 / std, 0.5 / std, 0.75 / std, *[-0.25 / std] * 3]
    )
    alike = group_advantages([1.0, 1.0, 1.0, 0.0], list("aabb"), scale_rewards="batch")
    assert alike[:2] == [0.0, 0.0], "a group with equal rewards teaches nothing"
    assert alike[2:] == pytest.approx([0.5 / (0.5 + 1e-4), -0.5 / (0.5 + 1e-4)])
    assert group_advantages([2.0], ["a"], scale_rewards="batch") == [0.0]


def test_surrogates_by_hand() -> None:
    # Ratios 3, 3, ½, ½ with advantages −1, 1, −1, 1, between 0.8 and 1.2.
    logp_N = torch.tensor([0.3, 0.3, 0.3, 0.3]).log()
    old_N = torch.tensor([0.1, 0.1, 0.6, 0.6]).log()
    advantage_N = torch.tensor([-1.0, 1.0, -1.0, 1.0])
    plain, lost = clipped_surrogate(logp_N, old_N, advantage_N, clip_low=0.2, clip_high=0.2)
    assert plain.tolist() == pytest.approx([3.0, -1.2, 0.8, -0.5])
    assert lost.tolist() == [0, 1, 1, 0]
    bounded, lost = clipped_surrogate(
        logp_N, old_N, advantage_N, clip_low=0.2, clip_high=0.2, delta=2.0
    )
    assert bounded.tolist() == pytest.approx([2.0, -1.2, 0.8, -0.5]) and lost.tolist() == [
        1,
        1,
        1,
        0,
    ]
    logp_N.requires_grad_()
    loss_N, capped = cispo_surrogate(logp_N, old_N, advantage_N, cap=2.0)
    assert loss_N.tolist() == pytest.approx(
        [2 * math.log(0.3), -2 * math.log(0.3), math.log(0.3) / 2, -math.log(0.3) / 2]
    )
    assert capped.tolist() == [1, 1, 0, 0]
    (gradient,) = torch.autograd.grad(loss_N.sum(), logp_N)
    assert gradient.tolist() == pytest.approx([2.0, -2.0, 0.5, -0.5]), "no token loses its gradient"


def test_means_over_rollouts_by_hand() -> None:
    values, rows = torch.tensor([1.0, 3.0, 5.0, 7.0]), torch.tensor([0, 0, 2, 2])
    counted = torch.tensor([True, True, True, False])
    assert sequence_means(values, rows, counted, 3).tolist() == [2.0, 2.0, 5.0, 5.0]
    assert sequence_means(values[:0], rows[:0], counted[:0], 0).tolist() == []


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [("token_mean", (-1 + 3) / 4), ("sequence_mean", 0.0), ("max_tokens", (-1 + 3) / (2 * LIMIT))],
)
def test_aggregations_by_hand(aggregation: str, expected: float) -> None:
    # A right rollout of one token and a wrong one of three: a loss of −A per token.
    right, wrong = (dataclasses.replace(x) for x in (samples()[3], samples()[2]))
    right = with_verdict(right, "q", True)
    wrong = with_verdict(wrong, "q", False)
    grpo = Grpo(1.0, "none", aggregation=aggregation, max_tokens=LIMIT)  # type: ignore[arg-type]
    pair = [right, wrong]
    weights = grpo.token_weights(pair, grpo.denominators(pair))
    loss = sum(-2 * one.advantage * w for one in weights for w in one.weights)
    assert loss == pytest.approx(expected)


def with_verdict(sample, problem: str, correct: bool):
    rollout = sample.rollout
    rollout = dataclasses.replace(rollout, problem=dataclasses.replace(rollout.problem, id=problem))
    return dataclasses.replace(
        sample, critiqued=CritiquedRollout(rollout, Verdict(correct, True, "x"), None)
    )


def test_a_rollout_s_ratio_moves_all_its_tokens_alike() -> None:
    made = case(later=True)
    assert made.old_N is not None
    _, gradient_NH = our_loss(Grpo(0.7, importance_level="sequence", clip_high=9.0), made)
    # One token's old probability: every token of its rollout has another ratio, and no other has.
    other_N = made.old_N.clone()
    other_N[0] += 0.3
    _, moved_NH = our_loss(
        Grpo(0.7, importance_level="sequence", clip_high=9.0),
        dataclasses.replace(made, old_N=other_N),
    )
    changed = (gradient_NH - moved_NH).abs().sum(1) > 1e-9
    assert changed.tolist() == [True] * LENGTHS[0] + [False] * (sum(LENGTHS) - LENGTHS[0])


def slow_loss(form: Grpo, made: Case) -> tuple[Tensor, Tensor]:
    """The loss as loops over rollouts and tokens, and its gradient in the hidden states."""
    hidden_NH = made.hidden_NH.clone().requires_grad_()
    logp_N = made.logp(hidden_NH @ made.head_VH.T)
    reference_N = made.logp(made.reference_NV)
    old_N = logp_N.detach() if made.old_N is None else made.old_N
    advantages = form.advantages(samples())
    total, tokens, start = logp_N.new_zeros(()), 0, 0
    for row in range(B):
        at = range(start, start := start + LENGTHS[row])
        if form.mask_truncated and not FINISHED[row]:
            continue
        tokens += len(at)
        weights = [
            (old_N[i] - made.sampled_N[i]).exp().clamp(max=form.importance_cap or 1) for i in at
        ]
        mean_logratio = torch.stack([logp_N[i] - old_N[i] for i in at]).mean()
        losses = []
        for i, weight in zip(at, weights, strict=True):
            by_token = form.importance_level == "token"
            ratio = (logp_N[i] - old_N[i] if by_token else mean_logratio).exp()
            a = advantages[row]
            if form.surrogate == "cispo":
                loss = -min(ratio.item(), 1 + form.clip_high) * a * logp_N[i]
            else:
                bounded = ratio.clamp(1 - form.clip_low, 1 + form.clip_high)
                free = ratio if form.clip_delta is None else ratio.clamp(max=form.clip_delta)
                loss = -torch.minimum(free * a, bounded * a)
            if form.importance_cap is not None:
                of_token = by_token or form.surrogate == "cispo"
                loss = loss * (weight if of_token else sum(weights) / len(weights))
            d = reference_N[i] - logp_N[i]
            losses.append(loss + form.kl_coef * (d.exp() - d - 1))
        share = len(losses) if form.aggregation == "sequence_mean" else 1
        total = total + sum(losses) / share
    divisor = {"token_mean": tokens, "sequence_mean": B, "max_tokens": B * LIMIT}[form.aggregation]
    loss = total / divisor
    return loss.detach(), torch.autograd.grad(loss, hidden_NH)[0]


@pytest.mark.parametrize("later", [False, True], ids=["first update", "later update"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("form", FORMS)
def test_each_form_is_its_slow_form(form: str, option: str, level: str, later: bool) -> None:
    grpo, made = objective(form, option, level), case(later=later)
    if grpo is None:
        return
    want = slow_loss(grpo, made)
    for chunk_tokens in (1000, 3):
        got = our_loss(grpo, made, chunk_tokens=chunk_tokens)
        for ours, slow in zip(got, want, strict=True):
            torch.testing.assert_close(ours, slow, rtol=1e-10, atol=1e-13)


def test_only_mixed_groups_count_where_a_step_samples_others_in_their_place() -> None:
    step = [
        with_verdict(x, x.rollout.problem.id, y)
        for x, y in zip(samples(), (False, True, False, True, True, True), strict=True)
    ]
    mixed = Grpo(1.0, "batch", mixed_groups_only=True)
    assert mixed.denominators(step) == (sum(LENGTHS[:3]),)
    alone = Grpo(1.0, "batch").advantages(step[:3])
    assert mixed.advantages(step) == [*alone, 0.0, 0.0, 0.0], "nor in the standard deviation"
    for aggregation, count in (("sequence_mean", 3), ("max_tokens", 3 * LIMIT)):
        form = dataclasses.replace(mixed, aggregation=aggregation, max_tokens=LIMIT)
        assert form.denominators(step) == (count,)
    assert Grpo(1.0, "batch").denominators(step) == (sum(LENGTHS),)


def test_a_cut_rollout_is_masked_and_still_a_baseline() -> None:
    step, form = samples(), Grpo(1.0, mask_truncated=True)
    weights = form.token_weights(step, form.denominators(step))
    assert [any(one.weights) for one in weights] == list(FINISHED)
    assert form.advantages(step) == group_advantages(
        [float(x) for x in CORRECT], GROUPS, scale_rewards="group"
    )


def test_a_hybrid_s_rollout_ratio_is_of_the_tokens_that_grpo_has() -> None:
    """Where some tokens are distilled alone, the others are GRPO's as if the rollout had no more."""
    made = case(later=True)
    form = Grpo(0.7, importance_level="sequence", clip_low=0.1, clip_high=0.1)
    count = sum(LENGTHS)
    alone = torch.zeros(count, dtype=torch.float64)
    alone[[0, 1, 6]] = 1.0
    half = torch.full((count,), 0.5, dtype=torch.float64)
    batches = {
        share: with_ratios(form, made, share_N)
        for share, share_N in (("some", alone), ("half", half))
    }
    ratio_N = batches["some"].sequence_logratio_N
    assert ratio_N is not None and made.old_N is not None
    logratio_N = made.logp(made.hidden_NH @ made.head_VH.T) - made.old_N
    torch.testing.assert_close(ratio_N[:4], logratio_N[2:4].mean().expand(4))
    torch.testing.assert_close(ratio_N[6:9], logratio_N[7:9].mean().expand(3))
    other_N = batches["half"].sequence_logratio_N
    assert other_N is not None
    torch.testing.assert_close(other_N[:4], logratio_N[:4].mean().expand(4))


def with_ratios(form: Grpo, made: Case, share_N: Tensor) -> Batch:
    ids = [ids_of(row) for row in range(B)]
    ones_N = torch.ones(sum(LENGTHS), dtype=torch.float64)
    batch = Batch(
        sequences([(1, 2)] * B, ids, 0), None, torch.tensor([i for row in ids for i in row]), ones_N,
        ones_N, made.sampled_N, made.old_N, share_N,
    )  # fmt: skip
    student = Scores.single(made.hidden_NH, Head(made.head_VH))
    return form.with_sequence_ratios(student, batch, 5)
