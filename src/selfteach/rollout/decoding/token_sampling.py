"""Which token comes next: drawn with a number that the answer brings along, or the likeliest."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK = 256
"""Probabilities are summed over so many tokens, and one by one only within the block that is hit."""


def uniforms(key: int, tokens: int) -> np.ndarray:
    """A random stream of its own for each key of 128 bits: a number in [0, 1) per token."""
    return np.random.Generator(np.random.Philox(key=key)).random(tokens)


def draw(
    logits_RV: Tensor, uniform_B: Tensor, temperature: float, row_B: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Sample one token per answer by inverting the cumulative distribution at ``uniform_B`` in [0, 1).

    Answer b draws from row ``row_B[b]`` of the logits, by default from row b. Returns the tokens [B]
    and their log-probabilities (nats) under ``softmax(logits / temperature)``. Sums run in float64:
    in float32 the tail of a large vocabulary would drown in rounding. At temperature 0 it is the
    likeliest token, whose log-probability in that limit is 0.
    """
    rows, vocabulary = logits_RV.shape
    row_B = torch.arange(rows, device=logits_RV.device) if row_B is None else row_B
    if temperature == 0:
        return logits_RV.argmax(-1)[row_B], logits_RV.new_zeros(len(row_B), dtype=torch.float32)
    logp_RV = (logits_RV.float() / temperature).log_softmax(-1)
    share_RV, uniform_B1 = logp_RV.exp(), uniform_B.double()[:, None]
    if vocabulary <= BLOCK:
        cumulative_BV = share_RV.double().cumsum(-1)[row_B]
        token_B = _hit(cumulative_BV, uniform_B1 * cumulative_BV[:, -1:])
    else:
        share_RNW = F.pad(share_RV, (0, -vocabulary % BLOCK)).view(rows, -1, BLOCK)
        cumulative_BN = share_RNW.sum(-1, dtype=torch.float64).cumsum(-1)[row_B]
        target_B1 = uniform_B1 * cumulative_BN[:, -1:]
        block_B = _hit(cumulative_BN, target_B1)
        inside_BW = share_RNW[row_B, block_B].double().cumsum(-1)
        before_B1 = cumulative_BN.gather(1, block_B[:, None]) - inside_BW[:, -1:]
        within_B = _hit(inside_BW, target_B1 - before_B1)
        token_B = (block_B * BLOCK + within_B).clamp(max=vocabulary - 1)
    return token_B, logp_RV[row_B, token_B]


def _hit(cumulative_BN: Tensor, target_B1: Tensor) -> Tensor:
    """The first entry of each row that is larger than the target; the last where rounding has none."""
    found_B1 = torch.searchsorted(cumulative_BN, target_B1, right=True)
    return found_B1[:, 0].clamp(max=cumulative_BN.shape[1] - 1)
