"""Look up shapes of common models and count their parameters, without loading the model.

``architectures.json`` holds values of each model's ``config.json``; counts are computed from those.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

DATA = Path(__file__).with_name("architectures.json")


@dataclass(frozen=True, slots=True)
class Shape:
    """Describes a Llama-like decoder: grouped-query attention and a gated MLP.

    Parameters: embeddings V H (and as many for the head unless tied); per layer 2 H A + 2 H K for
    attention, 3 H I for the MLP, 2 H for norms; and H for the last norm. ``qwen2`` adds biases
    A + 2 K, ``qwen3`` norms of queries and keys, 2 D.
    """

    family: str
    """The ``model_type`` of transformers, like ``qwen3``."""
    hidden: int
    """Hidden size, H."""
    intermediate: int
    """Hidden size of the MLP, I."""
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    """Size of one head, D; all heads together A = heads · D, keys or values K = kv_heads · D."""
    vocabulary: int
    """Entries of the vocabulary, V."""
    positions: int
    """Longest sequence in tokens."""
    tied: bool
    """True if the head shares the embeddings' weights."""

    @property
    def attention(self) -> int:
        """Return A, the width of all heads."""
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        """Return K, the width of all keys (or values)."""
        return self.kv_heads * self.head_dim

    @property
    def parameters(self) -> int:
        """Return the number of parameters, tied ones counted once."""
        h, a, k = self.hidden, self.attention, self.keys
        extra = {"qwen2": a + 2 * k, "qwen3": 2 * self.head_dim}.get(self.family, 0)
        layer = 2 * h * a + 2 * h * k + 3 * h * self.intermediate + 2 * h + extra
        embeddings = self.vocabulary * h * (1 if self.tied else 2)
        return embeddings + self.layers * layer + h

    @property
    def linear_weights(self) -> int:
        """Return the number of weights of the layers' linear maps."""
        h, a, k = self.hidden, self.attention, self.keys
        return self.layers * (2 * h * a + 2 * h * k + 3 * h * self.intermediate)

    def adapters(self, rank: int, targets: Sequence[str]) -> int:
        """Count parameters of LoRA on these modules: rank (in + out) each. Unknown names add 0."""
        h, a, k, i = self.hidden, self.attention, self.keys, self.intermediate
        ends = {
            "q_proj": h + a, "k_proj": h + k, "v_proj": h + k, "o_proj": a + h,
            "gate_proj": h + i, "up_proj": h + i, "down_proj": i + h,
        }  # fmt: skip
        return self.layers * rank * sum(ends.get(target, 0) for target in targets)


@cache
def known_shapes() -> dict[str, Shape]:
    """Return shapes by hub id."""
    rows = json.loads(DATA.read_text(encoding="utf-8"))
    return {name: Shape(**row["shape"]) for row in rows for name in row["ids"]}
