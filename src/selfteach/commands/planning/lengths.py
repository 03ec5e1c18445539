"""Model the lengths of rollouts: a log-normal distribution, truncated where sampling stops.

Lengths of language models' outputs have a long tail: a few are several times as long as most, and a
step that needs all of them waits for these.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

ASSUMED_MEAN_SHARE, ASSUMED_SIGMA = 0.5, 0.6
"""Assumed where nothing was measured: a mean of half the limit, and this standard deviation of the
logarithm (untruncated, one rollout in forty would be more than three times as long as the median)."""
_NORMAL = NormalDist()


@dataclass(frozen=True, slots=True)
class LengthDistribution:
    """Describes lengths in tokens: exp(Normal(``mu``, ``sigma``)), truncated at ``cap``."""

    mu: float
    sigma: float
    cap: int

    @classmethod
    def with_mean(
        cls, mean: int | float, cap: int, sigma: float = ASSUMED_SIGMA
    ) -> LengthDistribution:
        """Return the distribution with this mean after truncation; all ``cap`` if ``mean >= cap``."""
        if mean >= cap:
            return cls(math.log(cap), 0.0, cap)
        low, high = math.log(1e-3), math.log(cap) + 40 * max(sigma, 1e-3)
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (middle, high) if cls(middle, sigma, cap).mean < mean else (low, middle)
        return cls(high, sigma, cap)

    @classmethod
    def fitted_to(cls, lengths: Sequence[float], cap: int) -> LengthDistribution:
        """Return the distribution with the mean and the log-standard-deviation of ``lengths``."""
        logs = np.log([max(1.0, length) for length in lengths])
        return cls.with_mean(float(np.mean(lengths)), cap, float(logs.std()))

    @property
    def mean(self) -> float:
        """Return the mean after truncation, in tokens."""
        if self.sigma == 0:
            return min(math.exp(self.mu), self.cap)
        below = (math.log(self.cap) - self.mu) / self.sigma
        untruncated = math.exp(self.mu + self.sigma**2 / 2) * _NORMAL.cdf(below - self.sigma)
        return untruncated + self.cap * (1 - _NORMAL.cdf(below))

    @property
    def truncated_share(self) -> float:
        """Return the share of rollouts that reach the limit, 0 to 1."""
        if self.sigma == 0:
            return float(self.mu >= math.log(self.cap))
        return 1 - _NORMAL.cdf((math.log(self.cap) - self.mu) / self.sigma)

    def sample(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Sample ``count`` lengths: whole tokens from 1 to ``cap``, as floats."""
        lengths = np.exp(rng.normal(self.mu, self.sigma, count))
        return np.clip(np.rint(lengths), 1, self.cap)
