"""Computes Avg@k, Pass@k and Maj@k of k rollouts per problem, with bootstrap intervals.

Pure functions of numpy arrays; nothing here depends on models, files or arms. Axis letters:

    P  problems        K  rollouts of one problem        S  seeds (training runs)        R  resamples

Sources: unbiased Pass@k, Chen et al. (arXiv:2107.03374, eq. 1); resampling rows and columns
independently, Owen ("The pigeonhole bootstrap", Annals of Applied Statistics, 2007).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
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


def bootstrap_mean(values_SP: np.ndarray, *, resamples: int, seed: int) -> Interval:
    """Return the mean over seeds and problems, with a 95 % interval for new seeds *and* new problems.

    Every resample draws S seeds and, independently, P problems, both with replacement; the interval
    is that of the resampled means' percentiles. ``values_SP`` holds one value per seed and problem
    (an Avg@k, say), already averaged over rollouts.

    How far to trust it. With S seeds the spread *between seeds* comes out too small by a factor of
    about sqrt((S-1)/S) (0.71 for 2 seeds, 0.89 for 5); with one seed it is not seen at all; and a
    percentile interval does not widen for small samples as Student's t does. The noise of single
    cells, on the other hand, enters with (2-1/S)(2-1/P)-1 times its variance (1 for one seed, 3 for
    many; Owen), so that with few rollouts per problem several seeds err on the wide side.

    Raises ValueError for an empty table, for values that are not finite, or without resamples.
    """
    values_SP = _table(values_SP, "values_SP")
    if not np.isfinite(values_SP).all():
        count = int((~np.isfinite(values_SP)).sum())
        raise ValueError(f"values_SP holds {count} values that are not finite")
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}")
    means_R = np.concatenate(
        [
            ((seeds_RS @ values_SP) * problems_RP).sum(axis=1) / values_SP.size
            for seeds_RS, problems_RP in _draws(values_SP.shape, resamples, seed)
        ]
    )
    low, high = np.percentile(means_R, TAILS)
    return Interval(float(values_SP.mean()), float(low), float(high))


def bootstrap_difference(
    a_SP: np.ndarray, b_SP: np.ndarray, *, resamples: int, seed: int
) -> Interval:
    """Return the mean of a - b, with the same draws of seeds and of problems for both.

    What both arms share (a hard problem, a lucky order of questions) cancels. The limits are those
    of `bootstrap_mean`, and the 95 % are of one difference: of twenty such intervals, expect one to
    miss.

    Raises ValueError unless both have the same seeds and problems, that is, the same shape.
    """
    a_SP, b_SP = _table(a_SP, "a_SP"), _table(b_SP, "b_SP")
    if a_SP.shape != b_SP.shape:
        raise ValueError(f"a pair needs equal shapes [S, P], got {a_SP.shape} and {b_SP.shape}")
    return bootstrap_mean(a_SP - b_SP, resamples=resamples, seed=seed)


def resampled_counts(clusters: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Yield how often each of P clusters is drawn in each resample, blocks of [r, P] with r ≤ `BLOCK`.

    The same arguments give the same draws: what is computed from them for two conditions is paired.
    """
    for (counts_RP,) in _draws((clusters,), resamples, seed):
        yield counts_RP


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


Draws = Iterable[list[np.ndarray]]
"""Blocks of resamples: how often each member of each kind is drawn, [r, members]."""


def _draws(kinds: tuple[int, ...], resamples: int, seed: int) -> Draws:
    """Draw with replacement, for each kind separately, as many members as it has."""
    small = resamples * sum(kinds) <= MAX_CACHED_COUNTS
    return (_cached_draws if small else _new_draws)(kinds, resamples, seed)


def _new_draws(kinds: tuple[int, ...], resamples: int, seed: int) -> Draws:
    rng = np.random.default_rng(seed)
    for start in range(0, resamples, BLOCK):
        size = min(BLOCK, resamples - start)
        yield [rng.multinomial(kind, np.full(kind, 1 / kind), size) for kind in kinds]


@lru_cache(maxsize=2)
def _cached_draws(kinds: tuple[int, ...], resamples: int, seed: int) -> Draws:
    return list(_new_draws(kinds, resamples, seed))


def _table(values: np.ndarray, name: str) -> np.ndarray:
    """Return the values as floats. Raises ValueError unless two-dimensional and not empty."""
    table = np.asarray(values, dtype=float)
    if table.ndim != 2 or table.size == 0:
        raise ValueError(f"{name} must be a table that is not empty, got shape {table.shape}")
    return table
