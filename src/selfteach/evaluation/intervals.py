"""Compute 95 % intervals of means and of paired differences over few seeds and some problems.

Pure functions of numpy arrays. Axis letters: S seeds (training runs), P problems; ``...`` may hold any
number of tables, which the simulation of the coverage uses.

A table is y_sp = mean + seed_s + problem_p + cell_sp, all random. Let v_seed be the variance of the
seeds' means over S, v_problem that of the problems' means over P, and v_cell the noise of the cells
(mostly of sampling rollouts) in the grand mean, which both of them contain. With
V = v_seed + max(v_problem - v_cell, 0) the half width is the largest of

    t(S - 1) sqrt(v_seed)     Student's t over the seeds' means: what new seeds demand
    t(n) sqrt(V)              new seeds and new problems; n are Satterthwaite's degrees of freedom
    half of t(P - 1) sqrt(max(v_problem, v_cell)): half of what the problems alone give

**With one seed only the problems' part is left.** Such an interval says nothing about another training
run, so no difference between two ways of training can be decided by it.

*Rates* near 0 and 1 have Wilson's interval with the effective sample size that belongs to the width:
30 problems of 30 give [88 %, 100 %] and not a point. Where all problems agree, each counts once. Two
seeds' t of 12.7 is too large for Wilson's curve: what exceeds that of three seeds is added to both
sides (as squares, as in MOVER).

*Differences* (and lengths) in which few problems decide have an uncertain variance. It grows by
2 (kurtosis - 3) / P, for 0-1 outcomes about as much as by the two pseudo-observations of Bonett and
Price; where no problem differs the variance is that of two such observations.

**Measured coverage** in percent (tests/unit/evaluation/test_interval_coverage.py: 30, 100 and 200
problems, seeds that do not differ or with a standard deviation of 3 points; 4,000 studies each):

                                        2 seeds         3 seeds         5 seeds
    mean Avg@12                         96.2 to 98.4    95.0 to 96.0    94.5 to 95.9
    difference of Avg@12, no effect     95.1 to 97.6    95.2 to 96.9    95.0 to 95.8
    mean Pass@12, 98 to 99 %            95.1 to 99.4    97.5 to 98.8    97.2 to 99.0

The last of the three widths is half, not all, of what the problems alone give: with all of it 98 to
99 % of differences are covered where seeds do not differ. Two seeds are conservative (up to 98.4) where
problems vary more than seeds: one degree of freedom cannot tell a small spread from a large one. Near
100 % an interval has only few possible ends. Where seeds spread by more than their distance from 100 %
(6 points at 99 %), the coverage of two and three seeds falls to 76 and 88; a rare kind of problem that
is not in the sample is not seen by any interval.

Sources: Satterthwaite (Biometrics Bulletin, 1946); Searle, Casella and McCulloch ("Variance
Components", 1992); Wilson (JASA 22, 1927), with an effective sample size as Franco, Little, Louis and
Slud (Journal of Survey Statistics and Methodology, 2019) recommend; Zou and Donner (Statistics in
Medicine, 2008; MOVER); Bonett and Price (Journal of Educational and Behavioral Statistics, 2012);
Miller ("Adding error bars to evals", arXiv:2411.00640; paired, clustered by problem).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import stdtrit

from selfteach.evaluation.statistics import Interval

UPPER_TAIL = 0.975
"""Probability below the upper end of a 95 % interval."""
LEAST_SHARE = 0.5
"""No interval is narrower than this share of what the sampling of problems alone would give."""
SEEDS_IN_WILSON = 3
"""Student's quantile for so many seeds is the largest that Wilson's curve is used with."""
PERCENT = (0.0, 100.0)
"""Bounds of a rate in percent."""

Bounds = tuple[float, float] | None
"""Least and greatest value of a measure; None if it has none, like a length."""


class Limits(NamedTuple):
    """Holds means and the ends of their 95 % intervals, each [...]."""

    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


class _Table(NamedTuple):
    """Describes tables [..., S, P] by their means and the variances that these have."""

    seeds: int
    problems: int
    mean: np.ndarray
    problem_means: np.ndarray
    """[..., P]"""
    v_seed: np.ndarray
    v_problem: np.ndarray
    v_cell: np.ndarray
    """Variances of the grand mean, see the module."""


def mean_interval(values: np.ndarray | Sequence[np.ndarray], *, bounds: Bounds) -> Interval:
    """Return the mean over seeds and problems, with a 95 % interval for new seeds *and* new problems.

    ``values`` holds one value per seed and problem, [S, P], already averaged over rollouts (an Avg@k,
    say); or one array per seed, [P_s], if seeds answered different numbers of problems, with the mean
    of the seeds' means. With one seed the interval covers new problems only. ``bounds`` are those
    of a rate, `PERCENT`; None for a measure without bounds.

    Raises ValueError for an empty table or values that are not finite.
    """
    rows = [np.asarray(row, dtype=float) for row in values]
    if len({row.shape for row in rows}) > 1:
        low, high = bounds or (0.0, 1.0)
        table = _describe_ragged([_finite_table(row[None])[0] - low for row in rows], high - low)
        return _interval(_mean_limits(table, bounds))
    return _interval(mean_limits(_finite_table(values), bounds=bounds))


def difference_interval(a_SP: np.ndarray, b_SP: np.ndarray, *, bounds: Bounds) -> Interval:
    """Return the mean of a - b over seeds and problems, paired by both, with its 95 % interval.

    What both arms share (a hard problem, a lucky order of questions) cancels. ``bounds`` are those of
    a and b. The 95 % are of one difference: of twenty such intervals, expect one to miss.

    Raises ValueError unless both have the same seeds and problems, that is, the same shape.
    """
    a_SP, b_SP = _finite_table(a_SP), _finite_table(b_SP)
    if a_SP.shape != b_SP.shape:
        raise ValueError(f"a pair needs equal shapes [S, P], got {a_SP.shape} and {b_SP.shape}")
    return _interval(difference_limits(a_SP - b_SP, bounds=bounds))


def mean_limits(values: np.ndarray, *, bounds: Bounds) -> Limits:
    """Return the means of tables [..., S, P] with their intervals (`mean_interval`)."""
    low, high = bounds or (0.0, 1.0)
    return _mean_limits(_describe((np.asarray(values, dtype=float) - low) / (high - low)), bounds)


def difference_limits(differences: np.ndarray, *, bounds: Bounds) -> Limits:
    """Return means of tables of differences, [..., S, P], with their intervals.

    ``bounds`` are those of what was subtracted.
    """
    reach = np.inf if bounds is None else bounds[1] - bounds[0]
    return _symmetric(_describe(differences), reach)


def _interval(limits: Limits) -> Interval:
    return Interval(*(float(end) for end in limits))


def _mean_limits(table: _Table, bounds: Bounds) -> Limits:
    """Return the intervals of means; the table's values are scaled to 0..1 if there are bounds."""
    if bounds is None:
        return _symmetric(table, np.inf)
    low, high = bounds
    return Limits(*(low + (high - low) * end for end in _wilson(table)))


def _symmetric(table: _Table, reach: float) -> Limits:
    half = np.sqrt(_squared_half_width(_with_rare_values(table, reach)))
    return Limits(
        table.mean, np.maximum(table.mean - half, -reach), np.minimum(table.mean + half, reach)
    )


def _describe(values: np.ndarray) -> _Table:
    """Return means and their variances, from the mean squares of the two-way analysis of variance."""
    values = np.asarray(values, dtype=float)
    seeds, problems = values.shape[-2:]
    seed_means, problem_means = values.mean(-1), values.mean(-2)
    mean = seed_means.mean(-1)
    cells = values - seed_means[..., :, None] - problem_means[..., None, :] + mean[..., None, None]
    return _Table(
        seeds, problems, mean, problem_means,
        v_seed=_squares(seed_means, mean) / (max(seeds - 1, 1) * seeds),
        v_problem=_squares(problem_means, mean) / (max(problems - 1, 1) * problems),
        v_cell=(cells**2).sum((-2, -1))
        / (max(seeds - 1, 1) * max(problems - 1, 1) * seeds * problems),
    )  # fmt: skip


def _describe_ragged(rows: Sequence[np.ndarray], scale: float) -> _Table:
    """Describe seeds that share no problems; each seed counts the same."""
    means = np.array([row.mean() for row in rows]) / scale
    noise = [row.var(ddof=1) / len(row) if len(row) > 1 else 0.0 for row in rows]
    v_cell = np.array(np.mean(noise) / len(rows) / scale**2)
    v_seed = np.array(means.var(ddof=1) / len(rows))
    problem_means = np.concatenate(rows) / scale
    return _Table(
        len(rows), len(problem_means), means.mean(), problem_means, v_seed, v_cell, v_cell
    )  # fmt: skip


def _squares(values: np.ndarray, mean: np.ndarray, power: int = 2) -> np.ndarray:
    return ((values - mean[..., None]) ** power).sum(-1)


def _quantile(degrees: np.ndarray | float) -> np.ndarray:
    """Return Student's quantile of a two-sided 95 % interval."""
    return stdtrit(np.maximum(degrees, 1), UPPER_TAIL)


def _problems_alone(table: _Table) -> np.ndarray:
    """Return the mean's variance if seeds did not differ: no less than the noise of the cells."""
    pooled = (table.v_problem + (table.seeds - 1) * table.v_cell) / table.seeds
    return np.maximum(table.v_problem, pooled)


def _squared_half_width(table: _Table) -> np.ndarray:
    """Return the square of an interval's half width, [...]."""
    alone = _quantile(table.problems - 1) ** 2 * _problems_alone(table)
    if table.seeds == 1:
        return alone
    added = np.maximum(table.v_problem - table.v_cell, 0)
    variance = table.v_seed + added
    spread = table.v_seed**2 / (table.seeds - 1) + added**2 / max(table.problems - 1, 1)
    degrees = np.divide(variance**2, spread, out=np.ones_like(spread), where=spread > 0)
    return np.max(
        [
            _quantile(table.seeds - 1) ** 2 * table.v_seed,
            _quantile(degrees) ** 2 * variance,
            LEAST_SHARE**2 * alone,
        ],
        axis=0,
    )


def _with_rare_values(table: _Table, reach: float) -> _Table:
    """Return the table with the problems' variance enlarged where few problems decide it."""
    squares = _squares(table.problem_means, table.mean)
    fourths = _squares(table.problem_means, table.mean, 4)
    kurtosis = np.divide(
        table.problems * fourths, squares**2, out=np.zeros_like(squares), where=squares > 0
    )
    unseen = 2 * reach**2 / (table.problems + 2) ** 2 if np.isfinite(reach) else 0.0
    enlarged = table.v_problem * (1 + 2 * np.maximum(kurtosis - 3, 0) / table.problems)
    return table._replace(v_problem=np.where(squares > 0, enlarged, unseen))


def _wilson(table: _Table) -> Limits:
    """Return intervals of rates in 0..1."""
    p, quantile_2 = table.mean, _quantile(table.problems - 1) ** 2
    half_2 = _squared_half_width(table)
    beyond = np.maximum(half_2 - quantile_2 * _problems_alone(table), 0)
    share = min(1, (_quantile(SEEDS_IN_WILSON - 1) / _quantile(table.seeds - 1)) ** 2)
    added_2 = np.where(table.seeds > 1, (1 - share) * beyond, 0)
    binomial = np.clip(p * (1 - p), 0, None)
    # The inverse effective size times the squared quantile. Near an end few problems tell about it.
    ratio = np.divide(half_2 - added_2, binomial, out=np.zeros_like(p), where=binomial > 1e-12)
    end = np.where(p >= 0.5, 1.0, 0.0)
    short = (np.abs(table.problem_means - end[..., None]) > 1e-9).sum(-1)
    one_each = quantile_2 / table.problems
    ratio = np.maximum(ratio, np.minimum(one_each, ratio + one_each * (2 / (short + 2)) ** 2))
    centre = (p + ratio / 2) / (1 + ratio)
    half = np.sqrt(binomial * ratio + ratio**2 / 4) / (1 + ratio)
    below, above = (np.sqrt(d**2 + added_2) for d in (p - centre + half, centre + half - p))
    return Limits(p, np.maximum(p - below, 0), np.minimum(p + above, 1))


def _finite_table(values: np.ndarray | Sequence[np.ndarray]) -> np.ndarray:
    table = np.asarray(values, dtype=float)
    if table.ndim != 2 or table.size == 0:
        raise ValueError(f"values must be a table that is not empty, got shape {table.shape}")
    if not np.isfinite(table).all():
        count = int((~np.isfinite(table)).sum())
        raise ValueError(f"the table holds {count} values that are not finite")
    return table
