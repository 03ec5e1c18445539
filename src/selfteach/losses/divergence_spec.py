"""Describes which divergence between student and teacher to compute; `divergence` computes it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from selfteach.errors import RecipeError

Kind = Literal["forward_kl", "reverse_kl", "jsd"]
Support = Literal["full", "top_k", "sampled"]
LARGEST_DIFFERENCE = 80.0
"""Log-probabilities further apart (nats) count as this far apart in a JSD's mixture: the exp of it is
finite in float32."""

Side = Literal["student", "teacher"]


@dataclass(frozen=True, slots=True)
class Divergence:
    """Describes a divergence: its kind, and the part of the vocabulary that it is taken over.

    Example (SDPO: the student's hundred likeliest tokens and a bucket for the rest)::

        Divergence(kind="jsd", support="top_k", top_k=100)

    Raises RecipeError when a value is impossible or would have no effect.
    """

    kind: Kind
    """``forward_kl`` KL(teacher ‖ student), ``reverse_kl`` KL(student ‖ teacher), or ``jsd``."""
    support: Support = "full"
    """Every vocabulary entry, K entries and a tail bucket, or the sampled token alone."""
    beta: float = 0.5
    """The teacher's share of the JSD's mixture, strictly between 0 and 1."""
    jsd_scaled: bool = False
    """Divide the JSD by beta (1 - beta), so that its limits at 0 and 1 are the two KLs."""
    top_k: int | None = None
    top_k_from: Side = "student"
    """Whose likeliest tokens are the top K."""
    clip: float | None = None
    """Cap (nats) on each entry's term, the tail bucket's included; the sum may become negative."""
    temperature: float = 1.0
    """Divides both sides' logits; the loss is not rescaled by its square."""
    control_variate: bool = False
    """Add KL(student ‖ teacher) to the sampled token's reward: same expected gradient."""

    def __post_init__(self) -> None:
        for allowed, message in self._requirements():
            if not allowed:
                raise RecipeError(f"divergence: {message}")

    @property
    def jsd_factor(self) -> float:
        """Return the factor of every term of a JSD: 1 / (beta (1 - beta)) if ``jsd_scaled``, else 1."""
        return 1 / (self.beta * (1 - self.beta)) if self.jsd_scaled else 1.0

    def has_tail(self, entries: int) -> bool:
        """Return whether a vocabulary of this many entries has some summed into a tail bucket."""
        return self.top_k is not None and self.top_k < entries

    def _requirements(self) -> tuple[tuple[bool, str], ...]:
        """Return pairs of a condition that must hold and the message for when it does not."""
        jsd, top_k, sampled = self.kind == "jsd", self.support == "top_k", self.support == "sampled"
        reverse = self.kind == "reverse_kl"
        return (
            _one_of("kind", self.kind, get_args(Kind)),
            _one_of("support", self.support, get_args(Support)),
            _one_of("top_k_from", self.top_k_from, get_args(Side)),
            (jsd or self.beta == 0.5, f"beta = {self.beta} has no meaning for {self.kind}"),
            (0 < self.beta < 1, f"beta must lie strictly between 0 and 1, got {self.beta}"),
            (jsd or not self.jsd_scaled, f"jsd_scaled has no meaning for {self.kind}"),
            (not (jsd and sampled), "jsd has no sampled-token form; use full or top_k"),
            (top_k == (self.top_k is not None), "top_k goes with support = 'top_k', and only then"),
            (self.top_k is None or self.top_k >= 1, f"top_k must be at least 1, got {self.top_k}"),
            (top_k or self.top_k_from == "student", "top_k_from needs support = 'top_k'"),
            (self.clip is None or self.clip > 0, f"clip must be positive, got {self.clip}"),
            (self.clip is None or not sampled, "clip has no meaning for a sampled token"),
            (0 < self.temperature < math.inf, f"temperature must be positive: {self.temperature}"),
            (
                (reverse and sampled) or not self.control_variate,
                "control_variate needs kind = 'reverse_kl' and support = 'sampled'",
            ),
        )


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> tuple[bool, str]:
    return value in choices, f"{name} must be one of {', '.join(choices)}, got {value!r}"
