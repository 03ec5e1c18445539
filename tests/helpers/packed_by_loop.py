"""Stands in for a GPU's attention over packed sequences: one sequence after another."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from selfteach.models import packed_attention


class PackedByLoop:
    """Computes what `torch.nn.attention.varlen.varlen_attn` computes, and counts its tokens."""

    def __init__(self) -> None:
        self.queries = self.keys = 0

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor,
        max_q: int, max_k: int, *, scale: float | None, window_size: tuple[int, int],
        enable_gqa: bool,
    ) -> Tensor:  # fmt: skip
        assert window_size == (-1, 0) and enable_gqa
        self.queries, self.keys = self.queries + len(query), self.keys + len(key)
        assert (cu_seq_q[-1], cu_seq_k[-1]) == (len(query), len(key))
        assert (max_q, max_k) == (int(cu_seq_q.diff().max()), int(cu_seq_k.diff().max()))
        states = []
        for row in range(len(cu_seq_q) - 1):
            q, k = (slice(int(c[row]), int(c[row + 1])) for c in (cu_seq_q, cu_seq_k))
            repeats = query.shape[1] // key.shape[1]
            keys, values = (x[k].repeat_interleave(repeats, 1) for x in (key, value))
            logits = torch.einsum("qhs,khs->hqk", query[q], keys)
            logits = logits * (query.shape[-1] ** -0.5 if scale is None else scale)
            count = logits.shape[-1] - logits.shape[-2]  # aligned at the ends
            hidden = torch.ones_like(logits[0], dtype=torch.bool).triu(count + 1)
            weights = logits.masked_fill(hidden, -torch.inf).softmax(-1)
            states.append(torch.einsum("hqk,khs->qhs", weights, values))
        return torch.cat(states)


def install(patch: pytest.MonkeyPatch, attention: Any = None) -> Any:
    """Let models pack their sequences with this attention; return it."""
    attention = attention or PackedByLoop()
    patch.setattr(packed_attention, "varlen_attn", attention)
    patch.setattr(packed_attention, "is_available", lambda device, dtype: True)
    return attention
