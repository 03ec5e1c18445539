"""Samples the next token: by inverting the cumulative distribution, or greedily at temperature 0.

The distribution may be cut by top_k, then top_p, then min_p, in transformers' order and to its sets.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK = 256
"""Probabilities are summed per block of this many tokens, and token by token in one block only."""


@dataclass(frozen=True, slots=True)
class TokenDistribution:
    """Describes the distribution of the next token, as in `types.Sampling`."""

    temperature: float
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0

    def logp(self, logits_RV: Tensor) -> Tensor:
        """Compute log-probabilities (nats) from logits, in float32; -inf for tokens that are cut."""
        scores_RV = logits_RV.float() / self.temperature
        if 0 < self.top_k < scores_RV.shape[-1]:
            least_R1 = scores_RV.topk(self.top_k).values[:, -1:]
            scores_RV = scores_RV.masked_fill(scores_RV < least_R1, -torch.inf)
        if self.top_p < 1:
            scores_RV = _cut_tail(scores_RV, 1 - self.top_p)
        logp_RV = scores_RV.log_softmax(-1)
        if self.min_p > 0:
            prob_RV = logp_RV.exp()
            rare_RV = prob_RV < self.min_p * prob_RV.amax(-1, keepdim=True)
            logp_RV = scores_RV.masked_fill(rare_RV, -torch.inf).log_softmax(-1)
        return logp_RV


def _cut_tail(scores_RV: Tensor, mass: float) -> Tensor:
    """Give -inf to the least likely tokens that together have at most this probability, but one."""
    ascending_RV, token_RV = scores_RV.sort(-1)
    cut_RV = _running_sums(ascending_RV.softmax(-1), torch.float32) <= mass
    cut_RV[:, -1] = False
    return scores_RV.masked_fill(cut_RV.scatter(-1, token_RV, cut_RV), -torch.inf)


def uniforms(key: int, tokens: int) -> np.ndarray:
    """Return one number in [0, 1) per token, from the random stream of this 128-bit key."""
    return np.random.Generator(np.random.Philox(key=key)).random(tokens)


def sample_token(
    logits_RV: Tensor,
    uniform_B: Tensor,
    distribution: TokenDistribution,
    row_B: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Sample one token per completion by inverting the cumulative distribution at ``uniform_B``.

    ``uniform_B`` is in [0, 1). Completion b samples from row ``row_B[b]`` of the logits, by default
    from row b. Returns the tokens [B] and their log-probabilities (nats) under the distribution:
    ``softmax(logits / temperature)`` over the tokens that are not cut. Sums run in float64: in float32
    the tail of a large vocabulary would be lost in rounding. At temperature 0 it is the most likely
    token, whose log-probability in that limit is 0.
    """
    rows, vocabulary = logits_RV.shape
    row_B = torch.arange(rows, device=logits_RV.device) if row_B is None else row_B
    if distribution.temperature == 0:
        return logits_RV.argmax(-1)[row_B], logits_RV.new_zeros(len(row_B), dtype=torch.float32)
    logp_RV = distribution.logp(logits_RV)
    prob_RV, uniform_B1 = logp_RV.exp(), uniform_B.double()[:, None]
    if vocabulary <= BLOCK:
        cumulative_BV = _running_sums(prob_RV)[row_B]
        token_B = _first_above(cumulative_BV, uniform_B1 * cumulative_BV[:, -1:])
    else:
        prob_RNW = F.pad(prob_RV, (0, -vocabulary % BLOCK)).view(rows, -1, BLOCK)
        cumulative_BN = _running_sums(prob_RNW.sum(-1, dtype=torch.float64))[row_B]
        target_B1 = uniform_B1 * cumulative_BN[:, -1:]
        block_B = _first_above(cumulative_BN, target_B1)
        inside_BW = _running_sums(prob_RNW[row_B, block_B])
        before_B1 = cumulative_BN.gather(1, block_B[:, None]) - inside_BW[:, -1:]
        within_B = _first_above(inside_BW, target_B1 - before_B1)
        token_B = (block_B * BLOCK + within_B).clamp(max=vocabulary - 1)
    return token_B, logp_RV[row_B, token_B]


def _running_sums(prob_BV: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return the running sums of probabilities.

    PyTorch has no deterministic running sum of floats for CUDA: there they are summed as integers.
    """
    if prob_BV.is_cuda and torch.are_deterministic_algorithms_enabled():
        return _integer_sums(prob_BV)
    return prob_BV.cumsum(-1, dtype=dtype)


def _integer_sums(prob_BV: Tensor) -> Tensor:
    """Return running sums of probabilities that are rounded to multiples of 2^-53: exact up to 1."""
    return (prob_BV.double() * 2.0**53).round().long().cumsum(-1).double() / 2.0**53


def _first_above(cumulative_BN: Tensor, target_B1: Tensor) -> Tensor:
    """Return the index [B] of each row's first entry above the target; if rounding leaves none, the
    last entry that adds to the sum: one of probability 0 is never sampled."""
    index_B1 = torch.searchsorted(cumulative_BN, target_B1, right=True)
    last_B1 = torch.searchsorted(cumulative_BN, cumulative_BN[:, -1:].contiguous())
    index_B = torch.minimum(index_B1, last_B1)[:, 0]
    return index_B.clamp(max=cumulative_BN.shape[1] - 1)  # sums of NaN have no entry
