"""Samples the next token: by inverting the cumulative distribution, or greedily at temperature 0."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK = 256
"""Probabilities are summed per block of this many tokens, and token by token in one block only."""


def uniforms(key: int, tokens: int) -> np.ndarray:
    """Return one number in [0, 1) per token, from the random stream of this 128-bit key."""
    return np.random.Generator(np.random.Philox(key=key)).random(tokens)


def sample_token(
    logits_RV: Tensor, uniform_B: Tensor, temperature: float, row_B: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Sample one token per completion by inverting the cumulative distribution at ``uniform_B``.

    ``uniform_B`` is in [0, 1). Completion b samples from row ``row_B[b]`` of the logits, by default
    from row b. Returns the tokens [B] and their log-probabilities (nats) under
    ``softmax(logits / temperature)``. Sums run in float64: in float32 the tail of a large vocabulary
    would be lost in rounding. At temperature 0 it is the most likely token, whose log-probability in
    that limit is 0.
    """
    rows, vocabulary = logits_RV.shape
    row_B = torch.arange(rows, device=logits_RV.device) if row_B is None else row_B
    if temperature == 0:
        return logits_RV.argmax(-1)[row_B], logits_RV.new_zeros(len(row_B), dtype=torch.float32)
    logp_RV = (logits_RV.float() / temperature).log_softmax(-1)
    prob_RV, uniform_B1 = logp_RV.exp(), uniform_B.double()[:, None]
    if vocabulary <= BLOCK:
        cumulative_BV = prob_RV.double().cumsum(-1)[row_B]
        token_B = _first_above(cumulative_BV, uniform_B1 * cumulative_BV[:, -1:])
    else:
        prob_RNW = F.pad(prob_RV, (0, -vocabulary % BLOCK)).view(rows, -1, BLOCK)
        cumulative_BN = prob_RNW.sum(-1, dtype=torch.float64).cumsum(-1)[row_B]
        target_B1 = uniform_B1 * cumulative_BN[:, -1:]
        block_B = _first_above(cumulative_BN, target_B1)
        inside_BW = prob_RNW[row_B, block_B].double().cumsum(-1)
        before_B1 = cumulative_BN.gather(1, block_B[:, None]) - inside_BW[:, -1:]
        within_B = _first_above(inside_BW, target_B1 - before_B1)
        token_B = (block_B * BLOCK + within_B).clamp(max=vocabulary - 1)
    return token_B, logp_RV[row_B, token_B]


def _first_above(cumulative_BN: Tensor, target_B1: Tensor) -> Tensor:
    """Return the index [B] of each row's first entry above the target; the last if rounding leaves
    none."""
    index_B1 = torch.searchsorted(cumulative_BN, target_B1, right=True)
    return index_B1[:, 0].clamp(max=cumulative_BN.shape[1] - 1)
