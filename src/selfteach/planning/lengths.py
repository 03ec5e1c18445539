"""How long answers are: a log-normal distribution, cut where sampling stops.

Answers of language models have a long tail: a few are several times as long as most, and whoever
needs all of them waits for these.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

SHARE, SIGMA = 0.5, 0.6
"""Assumed where nothing was measured: a mean of half the limit, and this spread of the logarithm
(so that one answer in forty is more than three times as long as the middle one, were it not cut)."""
_NORMAL = NormalDist()


@dataclass(frozen=True, slots=True)
class Spread:
    """Lengths in tokens: exp(Normal(``mu``, ``sigma``)), cut at ``cap``."""

    mu: float
    sigma: float
    cap: int

    @classmethod
    def around(cls, mean: int | float, cap: int, sigma: float = SIGMA) -> Spread:
        """The distribution whose mean, after the cut, is ``mean``; at or above ``cap`` all are cut."""
        if mean >= cap:
            return cls(math.log(cap), 0.0, cap)
        low, high = math.log(1e-3), math.log(cap) + 40 * max(sigma, 1e-3)
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (middle, high) if cls(middle, sigma, cap).mean < mean else (low, middle)
        return cls(high, sigma, cap)

    @classmethod
    def like(cls, lengths: Sequence[float], cap: int) -> Spread:
        """The distribution of measured lengths: their mean, and the spread of their logarithms."""
        logs = np.log([max(1.0, length) for length in lengths])
        return cls.around(float(np.mean(lengths)), cap, float(logs.std()))

    @property
    def mean(self) -> float:
        """Of lengths after the cut."""
        if self.sigma == 0:
            return min(math.exp(self.mu), self.cap)
        below = (math.log(self.cap) - self.mu) / self.sigma
        kept = math.exp(self.mu + self.sigma**2 / 2) * _NORMAL.cdf(below - self.sigma)
        return kept + self.cap * (1 - _NORMAL.cdf(below))

    @property
    def cut(self) -> float:
        """Share of answers that reach the limit."""
        if self.sigma == 0:
            return float(self.mu >= math.log(self.cap))
        return 1 - _NORMAL.cdf((math.log(self.cap) - self.mu) / self.sigma)

    def draw(self, random: np.random.Generator, count: int) -> np.ndarray:
        """So many lengths, whole tokens from 1 to ``cap``."""
        lengths = np.exp(random.normal(self.mu, self.sigma, count))
        return np.clip(np.rint(lengths), 1, self.cap)
