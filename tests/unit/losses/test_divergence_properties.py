"""What every divergence satisfies, for any pair of distributions."""

import itertools
import math

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from selfteach.losses.divergence import (
    Divergence,
    forward_kl,
    jsd,
    log_probs,
    per_token,
    reverse_kl,
    sampled_reverse_kl,
    top_k_and_tail,
)

quick = settings(deadline=None, max_examples=60)
ATOL = 1e-13
BETAS = st.floats(0.01, 0.99)


@st.composite
def pairs(draw: st.DrawFn, bound: float = 25.0, masked: bool = True) -> tuple[Tensor, Tensor]:
    """Log-probabilities of student and teacher; some entries may have no mass on either side."""
    size = draw(st.integers(2, 7))
    sides = st.lists(st.floats(-bound, bound), min_size=size, max_size=size)
    student, teacher = (torch.tensor(draw(sides), dtype=torch.float64) for _ in range(2))
    if masked:
        off = torch.tensor(draw(st.lists(st.booleans(), min_size=size - 1, max_size=size - 1)))
        student[1:][off], teacher[1:][off] = -math.inf, -math.inf
    return log_probs(student), log_probs(teacher)


def all_divergences(student: Tensor, teacher: Tensor, beta: float) -> list[Tensor]:
    return [
        forward_kl(student, teacher),
        reverse_kl(student, teacher),
        jsd(student, teacher, beta),
        jsd(student, teacher, beta, scaled=True),
    ]


@quick
@given(pairs(), BETAS)
def test_never_negative_and_zero_between_equals(pair, beta) -> None:
    for value in all_divergences(*pair, beta):
        assert value >= -ATOL / 0.01
    for value in all_divergences(pair[0], pair[0].clone(), beta):
        assert abs(value) <= ATOL / 0.01


@quick
@given(pairs())
def test_zero_only_between_equals(pair) -> None:
    # Pinsker: KL >= |p - q|_1^2 / 2; and for the JSD at 1/2 the same through the mixture, which is
    # half as far from either side: JSD >= |p - q|_1^2 / 8.
    distance = (pair[0].exp() - pair[1].exp()).abs().sum()
    assert forward_kl(*pair) >= distance**2 / 2 - ATOL
    assert reverse_kl(*pair) >= distance**2 / 2 - ATOL
    assert jsd(*pair, 0.5) >= distance**2 / 8 - ATOL


@quick
@given(pairs())
def test_forward_is_reverse_with_the_sides_exchanged(pair) -> None:
    student, teacher = pair
    torch.testing.assert_close(
        forward_kl(student, teacher), reverse_kl(teacher, student), rtol=0, atol=0
    )


@quick
@given(pairs(), BETAS)
def test_jsd_with_the_sides_exchanged(pair, beta) -> None:
    student, teacher = pair
    exchanged = jsd(teacher, student, 1 - beta)
    torch.testing.assert_close(jsd(student, teacher, beta), exchanged, rtol=1e-9, atol=ATOL)
    torch.testing.assert_close(
        jsd(student, teacher, 0.5), jsd(teacher, student, 0.5), rtol=1e-12, atol=ATOL
    )


@quick
@given(pairs(bound=200.0), BETAS)
def test_jsd_is_at_most_the_entropy_of_the_mixing(pair, beta) -> None:
    bound = -beta * math.log(beta) - (1 - beta) * math.log1p(-beta)
    assert jsd(*pair, beta) <= bound + ATOL


def test_jsd_reaches_its_bound_between_disjoint_distributions() -> None:
    student = torch.tensor([0.0, -math.inf], dtype=torch.float64)
    bound = -0.3 * math.log(0.3) - 0.7 * math.log(0.7)
    assert math.isclose(jsd(student, student.flip(0), 0.3).item(), bound, rel_tol=1e-12)


@quick
@given(pairs(bound=2.0, masked=False))
def test_scaled_jsd_ends_at_the_two_kls_and_the_plain_one_at_zero(pair) -> None:
    end = 1e-8
    low, high = (jsd(*pair, beta, scaled=True) for beta in (end, 1 - end))
    torch.testing.assert_close(low, forward_kl(*pair), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(high, reverse_kl(*pair), rtol=1e-4, atol=1e-6)
    assert jsd(*pair, end) < 1e-6 and jsd(*pair, 1 - end) < 1e-6


@quick
@given(pairs(), BETAS, st.randoms(use_true_random=False))
def test_the_order_of_the_vocabulary_does_not_matter(pair, beta, random) -> None:
    order = list(range(len(pair[0])))
    random.shuffle(order)
    shuffled = [side[torch.tensor(order)] for side in pair]
    for got, want in zip(
        all_divergences(*shuffled, beta), all_divergences(*pair, beta), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-11)


@quick
@given(pairs(), BETAS, st.integers(1, 8), st.sampled_from(["student", "teacher"]))
def test_top_k_and_tail_lies_between_zero_and_the_whole(pair, beta, k, side) -> None:
    buckets = top_k_and_tail(*pair, k, side)
    assert all(len(bucket) == min(k + 1, len(pair[0])) for bucket in buckets)
    for bucket in buckets:  # still distributions
        torch.testing.assert_close(bucket.exp().sum().item(), 1.0, rtol=1e-12, atol=0)
    for coarse, whole in zip(
        all_divergences(*buckets, beta), all_divergences(*pair, beta), strict=True
    ):
        assert -ATOL / 0.01 <= coarse <= whole * (1 + 1e-12) + ATOL / 0.01


@quick
@given(pairs(masked=False), st.sampled_from(["student", "teacher"]))
def test_top_k_grows_with_k_and_keeps_the_likeliest(pair, side) -> None:
    ranked = pair[0] if side == "student" else pair[1]
    assume(len(ranked.unique()) == len(ranked))
    values = []
    for k in range(1, len(ranked) + 1):
        buckets = top_k_and_tail(*pair, k, side)
        top = (buckets[0] if side == "student" else buckets[1])[:k]
        assert torch.equal(top.sort().values, ranked.topk(k).values.sort().values)
        values.append(forward_kl(*buckets).item())
    assert all(b >= a - 1e-11 for a, b in itertools.pairwise(values))
    assert math.isclose(values[-1], forward_kl(*pair).item(), rel_tol=1e-12, abs_tol=ATOL)


@quick
@given(pairs(), st.floats(0.001, 2.0), st.sampled_from(["forward_kl", "reverse_kl", "jsd"]))
def test_a_clip_only_lowers_and_counts_what_it_lowered(pair, clip, kind) -> None:
    y = torch.tensor(0)
    plain = per_token(Divergence(kind), *pair, y)
    clipped = per_token(Divergence(kind, clip=clip), *pair, y)
    assert clipped.loss <= plain.loss
    assert clipped.loss <= clip * len(pair[0])
    assert (clipped.loss < plain.loss) <= (clipped.clipped > 0)
    assert 0 <= clipped.clipped <= 1


@quick
@given(pairs(), st.floats(0.1, 10.0), st.floats(-50, 50))
def test_temperature_divides_and_a_constant_changes_nothing(pair, temperature, shift) -> None:
    y = torch.tensor(0)
    spec = Divergence("forward_kl", temperature=temperature)
    got = per_token(spec, pair[0] + shift, pair[1] - shift, y)
    want = per_token(Divergence("forward_kl"), pair[0] / temperature, pair[1] / temperature, y)
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-9, atol=1e-11)
    plain = per_token(Divergence("forward_kl"), *pair, y)
    torch.testing.assert_close(got.teacher_logratio, plain.teacher_logratio, rtol=1e-9, atol=1e-11)


@quick
@given(pairs(), BETAS)
def test_gradients_are_finite_and_sum_to_zero(pair, beta) -> None:
    # Logits are free up to a constant, so a gradient cannot change their sum.
    for index in range(4):
        logits = pair[0].clone().requires_grad_()
        value = all_divergences(log_probs(logits), pair[1], beta)[index]
        (grad,) = torch.autograd.grad(value, logits)
        assert grad.isfinite().all()
        assert abs(grad.sum()) <= 1e-11


@quick
@given(pairs(bound=5.0, masked=False))
def test_the_control_variate_centres_the_reward(pair) -> None:
    student, teacher = pair[0].clone().requires_grad_(), pair[1]
    kl = reverse_kl(*pair)
    plain, centred = (  # the reward is minus the surrogate's derivative by log s(y)
        -torch.autograd.grad(sampled_reverse_kl(student, teacher, kl=control).sum(), student)[0]
        for control in (None, kl.expand(len(teacher)))
    )
    chances = pair[0].exp()
    torch.testing.assert_close((chances * plain).sum(), -kl, rtol=1e-10, atol=ATOL)
    assert abs((chances * centred).sum()) <= ATOL
    # E[(A + KL)^2] = E[A^2] - KL^2. The gradient's own variance falls with it as a rule only.
    second = (chances * plain**2).sum() - kl**2
    torch.testing.assert_close((chances * centred**2).sum(), second, rtol=1e-9, atol=1e-12)
