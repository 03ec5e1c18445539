"""Compute policy-gradient terms of sampled tokens: GRPO's advantages, surrogate and penalties.

Pure functions: no config, no logging, no collectives. Log-probabilities are in nats and belong to
the tokens that were sampled. GRPO: Shao et al., arXiv:2402.03300; estimator k3: Schulman,
"Approximating KL Divergence" (2020); clip range with two sides: DAPO, arXiv:2503.14476.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from selfteach.losses.analytic_gradients import block_rows, scaled
from selfteach.losses.kernels import row_kernels

GRPO_EPSILON = 1e-4
"""Added to a group's standard deviation; the constant of TRL 1.16's GRPOTrainer."""


def group_advantages(
    rewards: Sequence[float],
    groups: Sequence[Hashable],
    *,
    scale_rewards: Literal["group", "none"],
    eps: float = GRPO_EPSILON,
) -> list[float]:
    """Compute how much better each rollout did than the other rollouts of its problem.

    ``A_i = (r_i - mean) / (std + eps)`` within each group, with the unbiased standard deviation
    (divided by n - 1, as TRL does); ``scale_rewards="none"`` leaves out the division (Dr. GRPO,
    arXiv:2503.20783). Exactly 0 where all rewards of a group are equal, a group of one included.
    Groups may come in any order; the result is in the order of ``rewards``.

    Raises ValueError when ``rewards`` and ``groups`` differ in length.
    """
    members: defaultdict[Hashable, list[float]] = defaultdict(list)
    for reward, group in zip(rewards, groups, strict=True):
        members[group].append(reward)
    centre_scale = {
        group: _centre_and_scale(values, scale_rewards, eps) for group, values in members.items()
    }
    return [
        (reward - centre_scale[group][0]) / centre_scale[group][1]
        for reward, group in zip(rewards, groups, strict=True)
    ]


def _centre_and_scale(
    rewards: Sequence[float], scale_rewards: Literal["group", "none"], eps: float
) -> tuple[float, float]:
    """Return what to subtract from one group's rewards, and what to divide them by."""
    if max(rewards) == min(rewards):  # a rounded mean could differ from them by an ulp
        return rewards[0], 1.0
    mean = math.fsum(rewards) / len(rewards)
    if scale_rewards == "none":
        return mean, 1.0
    variance = math.fsum((reward - mean) ** 2 for reward in rewards) / (len(rewards) - 1)
    return mean, math.sqrt(variance) + eps


def clipped_surrogate(
    logp_N: Float[Tensor, " N"],
    old_logp_N: Float[Tensor, " N"],
    advantage_N: Float[Tensor, " N"],
    *,
    clip_low: float,
    clip_high: float,
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """Compute PPO's clipped surrogate per token, as a loss, and 1 where the clip removes the gradient.

    ``-min(r A, clip(r, 1 - low, 1 + high) A)`` with ``r = exp(logp - old_logp)``. A token is
    clipped when its ratio has already left the range in the direction of its advantage;
    it then has no gradient. ``old_logp_N`` and ``advantage_N`` are constants.
    """
    advantage_N = advantage_N.detach()
    ratio_N = (logp_N - old_logp_N.detach()).exp()
    bounded_N = ratio_N.clamp(1 - clip_low, 1 + clip_high)
    loss_N = -torch.minimum(ratio_N * advantage_N, bounded_N * advantage_N)
    too_high_N = (ratio_N > 1 + clip_high) & (advantage_N > 0)
    too_low_N = (ratio_N < 1 - clip_low) & (advantage_N < 0)
    return loss_N, (too_high_N | too_low_N).to(loss_N.dtype)


def k3(logp_N: Float[Tensor, " N"], reference_logp_N: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Estimate KL(policy ‖ reference) in nats from one token sampled by the policy.

    ``exp(d) - d - 1`` with ``d = reference_logp - logp``: unbiased for tokens drawn from the
    policy, and never negative. Its value is unbiased, its gradient is not that of the KL (in
    expectation it is the gradient of KL(reference ‖ policy)). The reference is a constant.
    """
    d_N = reference_logp_N.detach() - logp_N
    return torch.expm1(d_N) - d_N


def importance_weight(
    train_logp_N: Float[Tensor, " N"], engine_logp_N: Float[Tensor, " N"], cap: float
) -> Float[Tensor, " N"]:
    """Correct for an engine that sampled with slightly other probabilities than the trainer's.

    ``min(exp(train - engine), cap)``, detached: truncated importance sampling, biased towards 0
    by the cap, with a variance that the cap bounds. Both log-probabilities are of the sampled
    token, at the sampling temperature.
    """
    return (train_logp_N - engine_logp_N).detach().exp().clamp(max=cap)


def token_logp(
    logits: Float[Tensor, "*rows V"], ids: Int[Tensor, "*rows"], temperature: float
) -> Float[Tensor, "*rows"]:
    """Compute the log-probability (nats) of one token per row under ``softmax(logits / temperature)``.

    Computed in float32 at least; a token whose logit is -inf gets -inf. Differentiable once, in the
    logits; that gradient is the only new tensor of their size.
    """
    function = _FusedTokenLogp if row_kernels.runs(logits) else _TokenLogp
    return function.apply(logits, ids, temperature)  # pyright: ignore


class _TokenLogp(torch.autograd.Function):
    """Implements `token_logp` a few rows at a time, which fit in a CPU's cache.

    The gradient is computed in the backward pass, log-probabilities as the sampler computes them.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor, temperature: float) -> Tensor:
        logits_NV, ids_N1 = logits.reshape(-1, logits.shape[-1]), ids.reshape(-1, 1)
        ctx.save_for_backward(logits_NV, ids_N1)
        ctx.temperature, ctx.shape = temperature, logits.shape
        rows = block_rows(logits_NV)
        logps = [
            scaled(logits_BV, temperature).log_softmax(-1).gather(-1, ids_B1)
            for logits_BV, ids_B1 in zip(logits_NV.split(rows), ids_N1.split(rows), strict=True)
        ]
        return torch.cat(logps).reshape(ids.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logp: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Compute ``(1[v = id] - p_v) / temperature`` times each row's gradient."""
        logits_NV, ids_N1 = ctx.saved_tensors
        scale_N1 = grad_logp.reshape(-1, 1) / ctx.temperature
        grad_NV = torch.empty_like(logits_NV)
        rows = block_rows(logits_NV)
        blocks = (x.split(rows) for x in (logits_NV, ids_N1, scale_N1, grad_NV))
        for logits_BV, ids_B1, scale_B1, into_BV in zip(*blocks, strict=True):
            grad_BV = scaled(logits_BV, ctx.temperature).softmax(-1).mul_(-scale_B1)
            into_BV.copy_(grad_BV.scatter_add_(-1, ids_B1, scale_B1))
        return grad_NV.reshape(ctx.shape), None, None


class _FusedTokenLogp(torch.autograd.Function):
    """Implements `token_logp` with Triton kernels, which copy no logits."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor, temperature: float) -> Tensor:
        logits_NV, ids_N = logits.reshape(-1, logits.shape[-1]), ids.reshape(-1)
        sums = row_kernels.row_sums(logits_NV, ids_N, temperature)
        ctx.save_for_backward(logits_NV, ids_N, sums.log_sum_N)
        ctx.temperature, ctx.shape = temperature, logits.shape
        return sums.logp_N.reshape(ids.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logp: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        logits_NV, ids_N, log_sum_N = ctx.saved_tensors
        grad_N = grad_logp.reshape(-1)
        grad_NV = row_kernels.token_gradient(logits_NV, ids_N, log_sum_N, grad_N, ctx.temperature)
        return grad_NV.reshape(ctx.shape), None, None


def entropy(logits: Float[Tensor, "*rows V"], temperature: float = 1.0) -> Float[Tensor, "*rows"]:
    """Compute the entropy (nats) of ``softmax(logits / temperature)``, in float32 at least."""
    logp = scaled(logits, temperature).log_softmax(-1)
    mass = logp.exp()
    return -(mass * logp.masked_fill(mass == 0, 0.0)).sum(-1)
