"""Golden values, gradients and edges of the policy-gradient mathematics."""

import math

import pytest
import torch
from torch import Tensor

from selfteach.losses import analytic_gradients
from selfteach.losses.policy_gradient import (
    clipped_surrogate,
    entropy,
    group_advantages,
    importance_weight,
    k3,
    token_logp,
)

LN2 = math.log(2)


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_group_advantages_golden() -> None:
    # One right of four: mean 1/4, deviations 3/4 and -1/4; unbiased variance
    # (9/16 + 3/16) / 3 = 1/4, so the standard deviation is 1/2.
    got = group_advantages([1.0, 0.0, 0.0, 0.0], ["q"] * 4, scale_rewards="group", eps=1e-4)
    assert got == pytest.approx([0.75 / 0.5001] + [-0.25 / 0.5001] * 3, rel=1e-12)


def test_group_advantages_without_normalisation() -> None:
    got = group_advantages([1.0, 0.0, 0.0, 0.0], ["q"] * 4, scale_rewards="none")
    assert got == [0.75, -0.25, -0.25, -0.25]


def test_groups_may_be_interleaved_and_keep_the_order_of_the_rewards() -> None:
    apart = group_advantages([1.0, 0.0, 3.0, 2.0, 2.0], list("aabbb"), scale_rewards="group")
    mixed = group_advantages([3.0, 1.0, 2.0, 0.0, 2.0], list("babab"), scale_rewards="group")
    assert mixed == [apart[2], apart[0], apart[3], apart[1], apart[4]]


@pytest.mark.parametrize("scale_rewards", ["group", "none"])
@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, -1 / 3])
@pytest.mark.parametrize("size", [1, 3, 7])
def test_advantages_are_exactly_zero_where_rewards_are_alike(scale_rewards, reward, size) -> None:
    # A summed-up mean of 0.1s is off by an ulp: dividing that by eps would be noise.
    assert (
        group_advantages([reward] * size, [0] * size, scale_rewards=scale_rewards) == [0.0] * size
    )


def test_advantages_of_nothing_and_of_unequal_lists() -> None:
    assert group_advantages([], [], scale_rewards="group") == []
    with pytest.raises(ValueError, match="zip"):
        group_advantages([1.0], [], scale_rewards="group")


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "clipped"),
    [
        (1.0, 2.0, -2.0, 0.0),
        (1.5, 2.0, -1.3 * 2.0, 1.0),  # too high and A > 0: clipped at 1 + 0.3
        (1.5, -2.0, 3.0, 0.0),  # too high and A < 0: the larger loss counts
        (0.5, 2.0, -1.0, 0.0),  # too low and A > 0
        (0.5, -2.0, 0.8 * 2.0, 1.0),  # too low and A < 0: clipped at 1 - 0.2
        (1.25, 1.0, -1.25, 0.0),  # inside the upper side only
        (0.75, -1.0, 0.8, 1.0),  # outside the lower side only
    ],
)
def test_clipped_surrogate_golden(ratio, advantage, loss, clipped) -> None:
    logp_N = f64(math.log(ratio) - 1.0).requires_grad_()
    got_N, clipped_N = clipped_surrogate(
        logp_N, f64(-1.0), f64(advantage), clip_low=0.2, clip_high=0.3
    )
    torch.testing.assert_close(got_N, f64(loss), rtol=1e-12, atol=0)
    assert clipped_N.tolist() == [clipped]
    # d(-r A)/d logp = -r A; a clipped token has no gradient.
    (grad_N,) = torch.autograd.grad(got_N.sum(), logp_N)
    torch.testing.assert_close(
        grad_N, f64(0.0 if clipped else -ratio * advantage), rtol=1e-12, atol=0
    )


def test_clipped_surrogate_keeps_the_old_policy_and_the_advantage_constant() -> None:
    logp_N, old_N, advantage_N = (f64(-1.0).requires_grad_() for _ in range(3))
    loss_N, clipped_N = clipped_surrogate(logp_N, old_N, advantage_N, clip_low=0.2, clip_high=0.2)
    loss_N.sum().backward()
    assert old_N.grad is None and advantage_N.grad is None and not clipped_N.requires_grad


def test_clipped_surrogate_gradcheck() -> None:
    generator = torch.Generator().manual_seed(0)
    logp_N, old_N, advantage_N = torch.randn(3, 9, generator=generator, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda x: clipped_surrogate(x, old_N, advantage_N, clip_low=0.2, clip_high=0.3)[0],
        logp_N.requires_grad_(),
    )


def test_k3_golden() -> None:
    # d = ln(1/4) - ln(1/2) = -ln 2, so e^d - d - 1 = 1/2 + ln 2 - 1; equal policies give 0.
    got_N = k3(f64(math.log(0.5), -3.0), f64(math.log(0.25), -3.0))
    torch.testing.assert_close(got_N, f64(LN2 - 0.5, 0.0), rtol=1e-12, atol=0)


def test_k3_in_expectation() -> None:
    # Summed over the vocabulary with the policy's own probabilities, its value is
    # KL(policy || reference) and its gradient that of KL(reference || policy).
    generator = torch.Generator().manual_seed(1)
    policy_V, reference_V = torch.randn(2, 6, generator=generator, dtype=torch.float64)
    policy_V.requires_grad_()
    logp_V, reference_logp_V = policy_V.log_softmax(-1), reference_V.log_softmax(-1)
    expected = (logp_V.detach().exp() * k3(logp_V, reference_logp_V)).sum()
    kl = (logp_V.exp() * (logp_V - reference_logp_V)).sum()
    torch.testing.assert_close(expected, kl, rtol=1e-12, atol=0)
    (grad_V,) = torch.autograd.grad(expected, policy_V)
    opposite_V = logp_V.detach().exp() - reference_logp_V.exp()
    torch.testing.assert_close(grad_V, opposite_V, rtol=1e-10, atol=1e-14)


def test_k3_keeps_its_digits_near_zero_and_the_reference_constant() -> None:
    reference_N = f64(-1.0).requires_grad_()
    logp_N = f64(-1.0 - 1e-5).requires_grad_()
    value_N = k3(logp_N, reference_N)
    # e^d - d - 1 = d^2/2 + d^3/6 + ...
    torch.testing.assert_close(value_N, f64(0.5e-10 + 1e-15 / 6), rtol=1e-9, atol=0)
    value_N.sum().backward()
    assert reference_N.grad is None


def test_importance_weight_is_capped_and_constant() -> None:
    train_N = f64(-1.0, -1.0, -1.0).requires_grad_()
    weight_N = importance_weight(train_N, f64(-1.0 - LN2, -1.0, -1.0 + LN2), cap=1.5)
    torch.testing.assert_close(weight_N, f64(1.5, 1.0, 0.5), rtol=1e-12, atol=0)
    assert not weight_N.requires_grad


def test_token_logp_golden() -> None:
    # Logits (0, ln 9): at temperature 2 they are (0, ln 3), so the probabilities are 1/4, 3/4.
    logits_NV, ids_N = f64(0.0, math.log(9)).expand(2, 2), torch.tensor([0, 1])
    got_N = token_logp(logits_NV, ids_N, 2.0)
    torch.testing.assert_close(got_N, f64(math.log(1 / 4), math.log(3 / 4)), rtol=1e-12, atol=0)


def test_token_logp_is_minus_the_cross_entropy() -> None:
    generator = torch.Generator().manual_seed(2)
    logits_NV = torch.randn(4, 7, generator=generator, dtype=torch.float64).requires_grad_()
    ids_N = torch.tensor([6, 0, 3, 3])
    got_N = token_logp(logits_NV, ids_N, 0.7)
    want_N = -torch.nn.functional.cross_entropy(logits_NV / 0.7, ids_N, reduction="none")
    torch.testing.assert_close(got_N, want_N, rtol=1e-12, atol=0)
    (got_NV,) = torch.autograd.grad(got_N.sum(), logits_NV)
    (want_NV,) = torch.autograd.grad(want_N.sum(), logits_NV)
    torch.testing.assert_close(got_NV, want_NV, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("shape", [(5,), (2, 3), (0,)])
def test_token_logp_a_few_rows_at_a_time(shape, temperature, monkeypatch) -> None:
    """Two rows in a block, so that blocks end within the leading axes and the last is short."""
    monkeypatch.setitem(analytic_gradients.BLOCK_ENTRIES, "cpu", 23)
    generator = torch.Generator().manual_seed(6)
    logits = 3 * torch.randn(*shape, 11, generator=generator, dtype=torch.float64)
    ids = torch.randint(11, shape, generator=generator)
    logits[..., 4] = -math.inf  # also where it is the token: its log-probability is -inf
    ids[:1] = 4
    weights = torch.randn(shape, generator=generator, dtype=torch.float64)
    results = []
    for fn in (token_logp, plain_token_logp):
        leaf = logits.clone().requires_grad_()
        logp = fn(leaf, ids, temperature)
        finite = torch.where(logp.isfinite(), logp, 0.0)
        results.append((logp, *torch.autograd.grad((weights * finite).sum(), leaf)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


def plain_token_logp(logits: Tensor, ids: Tensor, temperature: float) -> Tensor:
    """As written in papers, by autograd."""
    return (logits / temperature).log_softmax(-1).gather(-1, ids[..., None])[..., 0]


def test_token_logp_gradcheck(monkeypatch) -> None:
    monkeypatch.setitem(analytic_gradients.BLOCK_ENTRIES, "cpu", 12)
    logits_NV = torch.randn(3, 5, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    ids_N = torch.tensor([4, 0, 2])
    fn = lambda x: token_logp(x, ids_N, 1.3)  # noqa: E731
    assert torch.autograd.gradcheck(fn, logits_NV.requires_grad_())


def test_entropy_golden() -> None:
    # (1/4, 3/4): ln 4 - (3/4) ln 3. Uniform over five: ln 5.
    torch.testing.assert_close(
        entropy(f64(0.0, math.log(3))), f64(2 * LN2 - 0.75 * math.log(3))[0], rtol=1e-12, atol=0
    )
    torch.testing.assert_close(
        entropy(f64(0.0, math.log(9)), 2.0),
        f64(2 * LN2 - 0.75 * math.log(3))[0],
        rtol=1e-12,
        atol=0,
    )
    torch.testing.assert_close(
        entropy(torch.ones(5).double()), f64(math.log(5))[0], rtol=1e-12, atol=0
    )


def test_entropy_of_masked_vocabulary_is_that_of_the_rest() -> None:
    logits_V = f64(0.0, math.log(3), -math.inf).requires_grad_()
    value = entropy(logits_V)
    torch.testing.assert_close(value, entropy(f64(0.0, math.log(3))), rtol=1e-12, atol=0)
    (grad_V,) = torch.autograd.grad(value, logits_V)
    assert grad_V.isfinite().all() and grad_V[2] == 0
    certain_V = f64(0.0, -math.inf).requires_grad_()
    certain = entropy(certain_V)
    certain.backward()
    assert certain == 0 and certain_V.grad is not None and certain_V.grad.tolist() == [0.0, 0.0]


def test_entropy_gradcheck() -> None:
    logits_NV = torch.randn(3, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: entropy(x, 1.3), logits_NV.requires_grad_())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_precision_logits_are_computed_in_float32(dtype) -> None:
    logits_NV = torch.randn(2, 9, generator=torch.Generator().manual_seed(4)).to(dtype)
    ids_N = torch.tensor([1, 8])
    assert token_logp(logits_NV, ids_N, 1.0).dtype == entropy(logits_NV).dtype == torch.float32
    want_N = token_logp(logits_NV.double(), ids_N, 1.0).float()
    own_NV = logits_NV.clone().requires_grad_()
    got_N = token_logp(own_NV, ids_N, 1.0)
    torch.testing.assert_close(got_N, want_N)
    (grad_NV,) = torch.autograd.grad(got_N.sum(), own_NV)
    want_NV = torch.nn.functional.one_hot(ids_N, 9) - logits_NV.double().softmax(-1)
    assert grad_NV.dtype == dtype, "rounded once, from float32"
    torch.testing.assert_close(grad_NV, want_NV.to(dtype))
