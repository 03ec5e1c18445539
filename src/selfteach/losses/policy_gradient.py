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
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from selfteach.losses.analytic_gradients import block_rows, scaled
from selfteach.losses.kernels import row_kernels

GRPO_EPSILON = 1e-4
"""Added to a group's standard deviation; the constant of TRL 1.16's GRPOTrainer."""


RewardScale = Literal["group", "batch", "none"]
"""What divides advantages: the standard deviation of the group's or of all rewards, or nothing."""


def group_advantages(
    rewards: Sequence[float],
    groups: Sequence[Hashable],
    *,
    scale_rewards: RewardScale,
    eps: float = GRPO_EPSILON,
) -> list[float]:
    """Compute how much better each rollout did than the other rollouts of its problem.

    ``A_i = (r_i - mean) / (std + eps)`` with the mean of its group and the unbiased standard deviation
    (divided by n - 1, as TRL does) of its group, or with ``scale_rewards="batch"`` of all rewards
    (REINFORCE++, arXiv:2501.03262); ``"none"`` leaves out the division (Dr. GRPO, arXiv:2503.20783).
    Exactly 0 where all rewards of a group are equal, a group of one included. Groups may come in any
    order; the result is in the order of ``rewards``.

    Raises ValueError when ``rewards`` and ``groups`` differ in length.
    """
    members: defaultdict[Hashable, list[float]] = defaultdict(list)
    for reward, group in zip(rewards, groups, strict=True):
        members[group].append(reward)
    batch_std = _deviation(rewards) if scale_rewards == "batch" else 0.0
    centre_scale: dict[Hashable, tuple[float, float]] = {}
    for group, values in members.items():
        std = _deviation(values) if scale_rewards == "group" else batch_std
        divisor = 1.0 if scale_rewards == "none" else std + eps
        centre_scale[group] = _mean(values), divisor
    return [
        (reward - centre_scale[group][0]) / centre_scale[group][1]
        for reward, group in zip(rewards, groups, strict=True)
    ]


def _mean(values: Sequence[float]) -> float:
    """Return the mean; of equal values exactly that value, which a rounded mean could miss."""
    equal = max(values) == min(values)
    return values[0] if equal else math.fsum(values) / len(values)


def _deviation(values: Sequence[float]) -> float:
    """Return the unbiased standard deviation; 0 for fewer than two values."""
    if len(values) < 2:
        return 0.0
    mean = _mean(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))


def clipped_surrogate(
    logp_N: Float[Tensor, " N"],
    old_logp_N: Float[Tensor, " N"],
    advantage_N: Float[Tensor, " N"],
    *,
    clip_low: float,
    clip_high: float,
    delta: float | None = None,
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """Compute PPO's clipped surrogate per token, as a loss, and 1 where the clip removes the gradient.

    ``-min(min(r, delta) A, clip(r, 1 - low, 1 + high) A)`` with ``r = exp(logp - old_logp)``. A token
    is clipped when its ratio has already left the range in the direction of its advantage; it then
    has no gradient. ``delta``, above 1 + high, bounds what a token with a negative advantage costs
    (dual clip, arXiv:1912.09729). ``old_logp_N`` and ``advantage_N`` are constants.
    """
    advantage_N = advantage_N.detach()
    ratio_N = (logp_N - old_logp_N.detach()).exp()
    bounded_N = ratio_N.clamp(1 - clip_low, 1 + clip_high)
    lost_N = (ratio_N > 1 + clip_high) & (advantage_N > 0)
    lost_N |= (ratio_N < 1 - clip_low) & (advantage_N < 0)
    if delta is not None:
        lost_N |= (ratio_N > delta) & (advantage_N < 0)
        ratio_N = ratio_N.clamp(max=delta)
    loss_N = -torch.minimum(ratio_N * advantage_N, bounded_N * advantage_N)
    return loss_N, lost_N.to(loss_N.dtype)


def cispo_surrogate(
    logp_N: Float[Tensor, " N"],
    old_logp_N: Float[Tensor, " N"],
    advantage_N: Float[Tensor, " N"],
    *,
    cap: float,
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """Compute CISPO's surrogate per token, as a loss, and 1 where the ratio is above its cap.

    ``-min(r, cap) A logp`` with ``r = exp(logp - old_logp)`` as a constant (MiniMax-M1,
    arXiv:2506.13585): REINFORCE with a truncated importance weight, so every token keeps a gradient.
    """
    ratio_N = (logp_N - old_logp_N).detach().exp()
    loss_N = -ratio_N.clamp(max=cap) * advantage_N.detach() * logp_N
    return loss_N, (ratio_N > cap).to(loss_N.dtype)


def sequence_means(
    value_N: Float[Tensor, " N"],
    row_N: Int[Tensor, " N"],
    counted_N: Bool[Tensor, " N"],
    rows: int,
) -> Float[Tensor, " N"]:
    """Return for each token the mean over the counted tokens of its row; 0 for a row without any.

    ``rows`` is above every index of a row: the number is given, since a GPU would be waited for.
    """
    share_N = counted_N.to(value_N.dtype)
    sum_B, count_B = value_N.new_zeros(2, rows)
    sum_B.index_add_(0, row_N, torch.where(counted_N, value_N, 0.0))
    count_B.index_add_(0, row_N, share_N)
    return (sum_B / count_B.clamp(min=1))[row_N]


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
