"""Computes Avg@k, Pass@k and Maj@k of k rollouts per problem, and resamples problems of one model.

Pure functions of numpy arrays; nothing here depends on models, files or arms. Axis letters:

    P  problems        K  rollouts of one problem        R  resamples        J  sums

Intervals over seeds and problems are in `selfteach.evaluation.intervals`. Source: unbiased Pass@k,
Chen et al. (arXiv:2107.03374, eq. 1).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

TAILS = (2.5, 97.5)
"""Percentiles that bound a 95 % interval."""
BLOCK = 1024
"""Resamples drawn at once, so that memory grows with neither resamples nor problems squared."""
MAX_CACHED_COUNTS = 2**22
"""Draws of at most so many counts are cached for the next table: drawing takes most of the time."""


@dataclass(frozen=True, slots=True)
class Interval:
    """Holds a mean with its 95 % interval, all in the unit of the values.

    Example: ``Interval(mean=35.8, low=31.2, high=40.1)``.
    """

    mean: float
    low: float
    high: float


def avg_at_k(correct_PK: np.ndarray) -> np.ndarray:
    """Return Avg@k: the share of correct rollouts of each problem, [P] in 0..1."""
    return _table(correct_PK, "correct_PK").mean(axis=1)


def pass_at_k(correct_PK: np.ndarray, k: int) -> np.ndarray:
    """Return Pass@k: the chance that k of n rollouts, drawn without replacement, hold a correct one.

    1 - C(n-c, k) / C(n, k) with c correct rollouts, [P] in 0..1, as a product of k factors below one,
    so that no binomial is ever formed. With k = n it is plain any-correct, with k = 1 it is Avg@k.
    Raises ValueError unless 1 <= k <= n.
    """
    correct_PK = _table(correct_PK, "correct_PK")
    n = correct_PK.shape[1]
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} needs 1 <= k <= n rollouts per problem, but n = {n}")
    wrong_P = n - correct_PK.sum(axis=1)
    drawn_K = np.arange(k)
    still_wrong_PK = (wrong_P[:, None] - drawn_K) / (n - drawn_K)
    return 1.0 - still_wrong_PK.prod(axis=1)  # holds a 0 where fewer than k are wrong


def maj_at_k(parsed: Sequence[Sequence[str | None]], correct_PK: np.ndarray) -> np.ndarray:
    """Return Maj@k: whether the most frequent answer is correct, [P] in 0..1.

    ``parsed`` [P][K] is the verifier's canonical form: equal strings are one answer. None is no
    vote. A tie is split evenly: the value is the share of the top-voted answers that are right. A
    problem without votes counts 0.
    """
    correct_PK = _table(correct_PK, "correct_PK")
    rows = zip(parsed, correct_PK, strict=True)
    return np.array([_majority(votes, correct_K) for votes, correct_K in rows])


def resampled_counts(clusters: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Yield how often each of P clusters is drawn in each resample, blocks of [r, P] with r ≤ `BLOCK`.

    The same arguments give the same draws: what is computed from them for two conditions is paired.
    """
    small = resamples * clusters <= MAX_CACHED_COUNTS
    yield from (_cached_draws if small else _new_draws)(clusters, resamples, seed)


def resampled_totals(sums_PJ: np.ndarray, *, resamples: int, seed: int) -> np.ndarray:
    """Return totals of additive quantities over clusters drawn with replacement, [R, J].

    ``sums_PJ`` holds one row per cluster: a problem with all its rollouts, say. Any statistic that is
    a function of totals (a mean is a sum over a count) has its bootstrap distribution from these rows.
    """
    sums_PJ = _table(sums_PJ, "sums_PJ")
    blocks = resampled_counts(len(sums_PJ), resamples, seed)
    return np.concatenate([counts_RP @ sums_PJ for counts_RP in blocks])


def percentile_interval(estimate: float, values_R: np.ndarray) -> Interval | None:
    """Return an estimate with its 95 % interval from resampled values.

    Resamples that are not finite (a ratio over nothing) are left out; None if the estimate is not
    finite, or fewer than half of the resamples are.
    """
    finite = values_R[np.isfinite(values_R)]
    if not np.isfinite(estimate) or 2 * len(finite) < len(values_R):
        return None
    low, high = np.percentile(finite, TAILS)
    return Interval(float(estimate), float(low), float(high))


def _majority(votes: Sequence[str | None], correct_K: np.ndarray) -> float:
    """Return the share of right votes among top-voted answers, which have equally many votes each."""
    counts = Counter(vote for vote in votes if vote is not None)
    most = max(counts.values(), default=0)
    is_top = [vote is not None and counts[vote] == most for vote in votes]
    correct = [right for right, top in zip(correct_K, is_top, strict=True) if top]
    return float(np.mean(correct)) if correct else 0.0


def _new_draws(clusters: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    rng = np.random.default_rng(seed)
    for start in range(0, resamples, BLOCK):
        size = min(BLOCK, resamples - start)
        yield rng.multinomial(clusters, np.full(clusters, 1 / clusters), size)


@lru_cache(maxsize=2)
def _cached_draws(clusters: int, resamples: int, seed: int) -> list[np.ndarray]:
    return list(_new_draws(clusters, resamples, seed))


def _table(values: np.ndarray, name: str) -> np.ndarray:
    """Return the values as floats. Raises ValueError unless two-dimensional and not empty."""
    table = np.asarray(values, dtype=float)
    if table.ndim != 2 or table.size == 0:
        raise ValueError(f"{name} must be a table that is not empty, got shape {table.shape}")
    return table
