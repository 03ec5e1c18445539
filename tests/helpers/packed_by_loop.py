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
        enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        assert window_size == (-1, 0)
        assert enable_gqa or query.shape[1] == key.shape[1]
        return self.attend(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor,
        max_q: int, max_k: int, scale: float | None,
    ) -> Tensor:  # fmt: skip
        """Attend along each sequence, its queries the last of its keys."""
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


class PackedByTorch211(PackedByLoop):
    """Has the signature of torch 2.11's function, which groups heads without a word for it."""

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor,
        max_q: int, max_k: int, *, return_aux: Any = None, scale: float | None = None,
        window_size: tuple[int, int] = (-1, -1),
    ) -> Tensor:  # fmt: skip
        assert window_size == (-1, 0) and return_aux is None
        return self.attend(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale)


def install(patch: pytest.MonkeyPatch, attention: Any = None) -> Any:
    """Let models pack their sequences with this attention; return it."""
    attention = attention or PackedByLoop()
    patch.setattr(packed_attention, "varlen_attn", attention)
    patch.setattr(packed_attention, "OPTIONS", packed_attention.options_of(attention))
    patch.setattr(packed_attention, "is_available", lambda device, dtype: True)
    return attention
