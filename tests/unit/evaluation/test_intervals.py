"""Intervals over seeds and problems: values by hand, independent formulas, ends, and refusals."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from selfteach.evaluation.intervals import (
    PERCENT,
    difference_interval,
    difference_limits,
    mean_interval,
    mean_limits,
)
from selfteach.evaluation.statistics import Interval

RNG = np.random.default_rng(0)


def width(interval: Interval) -> float:
    return interval.high - interval.low


# -- values by hand --------------------------------------------------------------------------


def test_problems_of_one_seed_have_students_t():
    values_P = np.linspace(30, 70, 40)
    interval = mean_interval([values_P], bounds=None)
    expected = stats.t.interval(0.95, 39, values_P.mean(), stats.sem(values_P))
    assert (interval.low, interval.high) == pytest.approx(expected)


def test_seeds_that_differ_have_students_t_over_their_means():
    seeds_S = np.array([10.0, 14.0, 15.0])
    values_SP = seeds_S[:, None] + RNG.normal(0, 0.01, (3, 50))
    interval = mean_interval(values_SP, bounds=None)
    expected = stats.t.interval(0.95, 2, values_SP.mean(), stats.sem(values_SP.mean(axis=1)))
    assert (interval.low, interval.high) == pytest.approx(expected, rel=1e-4)


def test_seeds_that_agree_have_the_interval_of_the_problems():
    problems_P = np.linspace(0, 100, 60)
    interval = mean_interval(np.stack([problems_P] * 3), bounds=None)
    expected = stats.t.interval(0.95, 59, problems_P.mean(), stats.sem(problems_P))
    assert (interval.low, interval.high) == pytest.approx(expected)


def test_both_spreads_add_up_with_satterthwaites_degrees_of_freedom():
    problems_P, seeds_S = np.linspace(-14, 14, 50), np.array([-1.0, -0.3, 0.2, 0.3, 0.8])
    values_SP = problems_P + seeds_S[:, None]  # without noise of cells
    v_seed, v_problem = seeds_S.var(ddof=1) / 5, problems_P.var(ddof=1) / 50
    degrees = (v_seed + v_problem) ** 2 / (v_seed**2 / 4 + v_problem**2 / 49)
    half = stats.t.ppf(0.975, degrees) * np.sqrt(v_seed + v_problem)
    interval = mean_interval(values_SP, bounds=None)
    assert width(interval) / 2 == pytest.approx(half)


def test_rates_of_one_seed_have_wilsons_interval():
    values_P = 100.0 * (np.arange(40) < 30)
    interval = mean_interval([values_P], bounds=PERCENT)
    # Wilson with the unbiased variance, so 39 instead of 40, and t for 39 degrees of freedom.
    p, n, t = 0.75, 39, stats.t.ppf(0.975, 39)
    centre = (p + t * t / (2 * n)) / (1 + t * t / n)
    half = t / (1 + t * t / n) * np.sqrt(p * (1 - p) / n + t * t / (4 * n * n))
    expected = 100 * (centre - half), 100 * (centre + half)
    assert (interval.low, interval.high) == pytest.approx(expected, rel=2e-3)


# -- ends ------------------------------------------------------------------------------------


@pytest.mark.parametrize("seeds", [1, 2, 5])
@pytest.mark.parametrize("value", [0.0, 100.0])
def test_problems_that_all_agree_are_no_point(seeds, value):
    interval = mean_interval(np.full((seeds, 30), value), bounds=PERCENT)
    ends = sorted(abs(end - value) for end in (interval.low, interval.high))
    assert ends == [0, pytest.approx(12.2, abs=0.1)]  # Wilson's t² / (30 + t²)
    wide = difference_interval(
        np.full((seeds, 30), value), np.full((seeds, 30), value), bounds=PERCENT
    )
    assert wide.low < -5 and wide.high > 5


def test_a_length_without_spread_is_a_point():
    assert mean_interval(np.full((3, 5), 40.0), bounds=None) == Interval(40, 40, 40)


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_intervals_stay_within_the_bounds_of_rates(seeds):
    values = RNG.random((50, seeds, 6)) ** 0.1
    limits = mean_limits(values, bounds=(0.0, 1.0))
    assert (limits.low >= 0).all() and (limits.high <= 1).all()
    assert (limits.low <= limits.mean).all() and (limits.mean <= limits.high).all()
    paired = difference_limits(values - values[::-1], bounds=(0.0, 1.0))
    assert (np.abs([paired.low, paired.high]) <= 1).all()


def test_zero_and_one_mirror_each_other():
    values_SP = RNG.random((3, 20)) ** 0.2 * 100
    high, low = (mean_interval(v, bounds=PERCENT) for v in (values_SP, 100 - values_SP))
    assert (low.low, low.high) == pytest.approx((100 - high.high, 100 - high.low))


# -- properties ------------------------------------------------------------------------------


def test_two_equal_seeds_by_chance_do_not_make_a_point():
    """The noise of the cells is known, so an interval far narrower than it is not believed."""
    noise_SP = RNG.normal(0, 10, (2, 100))
    noise_SP -= noise_SP.mean(axis=1, keepdims=True)  # equal means, different problems
    one_seed = width(mean_interval(noise_SP[:1], bounds=None))
    assert width(mean_interval(noise_SP, bounds=None)) > 0.3 * one_seed


def test_pairing_takes_away_what_both_arms_share():
    shared_P = RNG.normal(50, 15, 80)
    a_SP, b_SP = (shared_P + RNG.normal(shift, 3, (4, 80)) for shift in (3, 0))
    paired = difference_interval(a_SP, b_SP, bounds=PERCENT)
    apart = [mean_interval(v_SP, bounds=PERCENT) for v_SP in (a_SP, b_SP)]
    assert width(paired) < np.hypot(*map(width, apart)) / 4
    assert paired.mean == pytest.approx(apart[0].mean - apart[1].mean)


def test_swapping_the_arms_mirrors_the_interval():
    a_SP, b_SP = RNG.random((2, 3, 20))
    there = difference_interval(a_SP, b_SP, bounds=(0.0, 1.0))
    back = difference_interval(b_SP, a_SP, bounds=(0.0, 1.0))
    assert (back.mean, back.low, back.high) == pytest.approx((-there.mean, -there.high, -there.low))


def test_many_tables_at_once_are_those_one_by_one():
    values = RNG.random((4, 3, 20))
    for limits_of, one in (
        (mean_limits, lambda v: mean_interval(v, bounds=(0.0, 1.0))),
        (difference_limits, lambda v: difference_interval(v, 0 * v, bounds=(0.0, 1.0))),
    ):
        for *many, table in zip(*limits_of(values, bounds=(0.0, 1.0)), values, strict=True):
            single = one(table)
            assert many == pytest.approx([single.mean, single.low, single.high])


def test_seeds_that_answered_other_problems_are_clusters():
    rows = [np.array([40.0, 60, 50, 50]), np.array([70.0, 90, 80])]
    interval = mean_interval(rows, bounds=None)
    expected = stats.t.interval(0.95, 1, 65.0, stats.sem([50.0, 80.0]))
    assert (interval.mean, interval.low, interval.high) == pytest.approx((65, *expected))
    assert mean_interval(rows, bounds=PERCENT).low == 0
    solved = mean_interval([np.full(10, 100.0), np.full(9, 100.0)], bounds=PERCENT)
    assert solved.mean == 100 and 75 < solved.low < 90


# -- refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (4,)])
def test_tables_must_hold_something(shape):
    with pytest.raises(ValueError, match="not empty"):
        mean_interval(np.zeros(shape), bounds=None)


def test_values_without_a_mean_are_refused():
    with pytest.raises(ValueError, match="1 values that are not finite"):
        mean_interval(np.array([[1.0, np.nan]]), bounds=None)


def test_pairs_need_the_same_seeds_and_problems():
    with pytest.raises(ValueError, match=r"\(2, 3\) and \(3, 3\)"):
        difference_interval(np.ones((2, 3)), np.ones((3, 3)), bounds=None)
