"""Score sampled tokens without gradient, and estimate the KL between two models from them."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from selfteach.losses.policy_gradient import k3, token_logp
from selfteach.models.lm_head import Scores


@torch.no_grad()
def sampled_kl(
    reference: Scores,
    logp_N: Float[Tensor, " N"],
    ids_N: Int[Tensor, " N"],
    *,
    temperature: float,
    chunk_tokens: int,
) -> Float[Tensor, " N"]:
    """Estimate KL(policy ‖ reference) in nats from each sampled token (`k3`).

    ``logp_N`` are the policy's log-probabilities of ``ids_N`` at ``temperature``; the reference's are
    taken at the same, ``chunk_tokens`` tokens' logits at a time.
    """
    reference_logp_N = sampled_logp(
        reference, ids_N, temperature=temperature, chunk_tokens=chunk_tokens
    )
    return k3(logp_N, reference_logp_N)


@torch.no_grad()
def sampled_logp(
    scores: Scores, ids_N: Int[Tensor, " N"], *, temperature: float, chunk_tokens: int
) -> Float[Tensor, " N"]:
    """Compute sampled tokens' log-probabilities (nats), ``chunk_tokens`` tokens' logits at a time."""
    return torch.cat([
        token_logp(scores.logits(rows), ids_N[rows], temperature)
        for start in range(0, max(1, len(ids_N)), chunk_tokens)  # no tokens are one empty chunk
        for rows in [slice(start, min(start + chunk_tokens, len(ids_N)))]
    ])  # fmt: skip
