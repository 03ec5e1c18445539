"""Measures of k rollouts: golden values, slow references, properties; resampled problems."""

from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfteach.evaluation import statistics
from selfteach.evaluation.statistics import (
    Interval,
    avg_at_k,
    maj_at_k,
    pass_at_k,
    percentile_interval,
    resampled_totals,
)

answers = st.integers(1, 7).flatmap(
    lambda k: st.lists(st.lists(st.booleans(), min_size=k, max_size=k), min_size=1, max_size=4).map(
        np.array
    )
)
votes = st.lists(st.sampled_from(["a", "b", "c", None]), min_size=1, max_size=8)


def brute_force_pass(correct_K: np.ndarray, k: int) -> float:
    drawn = list(combinations(correct_K, k))
    return sum(any(subset) for subset in drawn) / len(drawn)


def brute_force_maj(row: list[str | None], right: str) -> float:
    """Every tied top vote is elected once, and the mean of the elections' outcomes is taken."""
    counts = Counter(vote for vote in row if vote is not None).most_common()
    elected = [vote for vote, count in counts if count == counts[0][1]]
    return sum(vote == right for vote in elected) / len(elected) if elected else 0.0


# -- golden values ---------------------------------------------------------------------------


def test_avg_is_the_share_of_right_answers():
    np.testing.assert_allclose(avg_at_k(np.array([[1, 0, 0, 0], [1, 1, 1, 0]])), [0.25, 0.75])


def test_pass_at_k_by_hand():
    # n = 4, c = 1, k = 2: 1 - C(3,2)/C(4,2) = 1 - 3/6; c = 2: 1 - C(2,2)/C(4,2) = 1 - 1/6.
    correct_PK = np.array([[1, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0], [1, 1, 1, 0]])
    np.testing.assert_allclose(pass_at_k(correct_PK, 2), [1 / 2, 5 / 6, 0, 1], rtol=1e-12)


def test_pass_at_k_stays_exact_where_binomials_overflow():
    # C(4000, 2000) has 1203 digits. With c = 1 the chance to draw the right answer is k / n.
    correct_PK = np.zeros((1, 4000))
    correct_PK[0, 17] = 1
    np.testing.assert_allclose(pass_at_k(correct_PK, 2000), [0.5], rtol=1e-9)


@pytest.mark.parametrize(
    ("row", "correct", "expected"),
    [
        (["7", "7", "3"], [1, 1, 0], 1.0),
        (["7", "3", "3"], [1, 0, 0], 0.0),
        (["7", "3", "7", "3"], [1, 0, 1, 0], 1 / 2),  # a tie of two, one of them right
        (["7", "3", "5"], [1, 0, 0], 1 / 3),  # a tie of three
        ([None, None, "7"], [0, 0, 1], 1.0),  # what cannot be parsed is no vote
        ([None, None, None], [0, 0, 0], 0.0),  # no votes
        (["7"], [1], 1.0),
        (["1/2", "1/2", "3", "3"], [1, 1, 0, 0], 1 / 2),
    ],
)
def test_maj_at_k_by_hand(row, correct, expected):
    np.testing.assert_allclose(maj_at_k([row], np.array([correct])), [expected], rtol=1e-12)


# -- slow references and properties ----------------------------------------------------------


@given(answers, st.data())
def test_pass_at_k_is_that_of_all_subsets(correct_PK, data):
    k = data.draw(st.integers(1, correct_PK.shape[1]))
    expected = [brute_force_pass(correct_K, k) for correct_K in correct_PK]
    np.testing.assert_allclose(pass_at_k(correct_PK, k), expected, atol=1e-12)


@given(answers)
def test_pass_at_1_is_avg_and_pass_at_n_is_any(correct_PK):
    np.testing.assert_allclose(pass_at_k(correct_PK, 1), avg_at_k(correct_PK), atol=1e-12)
    np.testing.assert_array_equal(
        pass_at_k(correct_PK, correct_PK.shape[1]), correct_PK.any(axis=1)
    )


@given(answers)
def test_pass_at_k_grows_with_k_within_0_and_1(correct_PK):
    curve_KP = np.stack([pass_at_k(correct_PK, k + 1) for k in range(correct_PK.shape[1])])
    assert (np.diff(curve_KP, axis=0) >= -1e-12).all()
    assert (curve_KP >= 0).all() and (curve_KP <= 1).all()


@given(votes)
def test_maj_at_k_is_the_mean_over_elections(row):
    correct_PK = np.array([[vote == "a" for vote in row]])
    np.testing.assert_allclose(maj_at_k([row], correct_PK), [brute_force_maj(row, "a")])


@given(votes, st.randoms(use_true_random=False))
def test_order_of_answers_does_not_matter(row, random):
    shuffled = random.sample(row, len(row))
    before, after = (np.array([[vote == "a" for vote in r]]) for r in (row, shuffled))
    np.testing.assert_allclose(maj_at_k([row], before), maj_at_k([shuffled], after))
    np.testing.assert_allclose(pass_at_k(before, 1), pass_at_k(after, 1))


# -- resampled problems ----------------------------------------------------------------------


def test_cached_draws_equal_new_ones(monkeypatch):
    sums_PJ = np.random.default_rng(4).random((30, 2))
    cached = [resampled_totals(sums_PJ, resamples=100, seed=7) for _ in range(2)]
    assert statistics._cached_draws(30, 100, 7) is statistics._cached_draws(30, 100, 7)
    monkeypatch.setattr(statistics, "MAX_CACHED_COUNTS", 0)
    new = resampled_totals(sums_PJ, resamples=100, seed=7)
    for totals in cached:
        np.testing.assert_array_equal(totals, new)
    assert not np.array_equal(new, resampled_totals(sums_PJ, resamples=100, seed=8))


def test_blocks_of_resamples_are_all_drawn(monkeypatch):
    monkeypatch.setattr(statistics, "BLOCK", 3)  # 3000 resamples in 1000 blocks
    values_P = np.random.default_rng(3).normal(size=400)
    totals_R = resampled_totals(values_P[:, None], resamples=3000, seed=0)[:, 0]
    interval = percentile_interval(values_P.mean(), totals_R / 400)
    assert interval is not None
    half = 1.96 * values_P.std() / np.sqrt(400)  # the plain bootstrap's standard error
    np.testing.assert_allclose(interval.high - interval.low, 2 * half, rtol=0.08)


# -- refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [0, -1, 4])
def test_pass_at_k_refuses_more_draws_than_answers(k):
    with pytest.raises(ValueError, match="n = 3"):
        pass_at_k(np.ones((2, 3)), k)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (4,)])
def test_tables_must_hold_something(shape):
    for refuse in (
        lambda: avg_at_k(np.zeros(shape)),
        lambda: resampled_totals(np.zeros(shape), resamples=10, seed=0),
    ):
        with pytest.raises(ValueError, match="not empty"):
            refuse()


def test_votes_and_verdicts_must_have_one_shape():
    with pytest.raises(ValueError, match="zip"):
        maj_at_k([["7", "3"]], np.ones((1, 3)))
    with pytest.raises(ValueError, match="zip"):
        maj_at_k([["7"]], np.ones((2, 1)))


def test_totals_are_those_of_drawn_clusters():
    sums_PJ = np.array([[1.0, 10.0], [2.0, 20.0], [4.0, 40.0]])
    totals_RJ = resampled_totals(sums_PJ, resamples=1500, seed=3)
    assert totals_RJ.shape == (1500, 2)
    np.testing.assert_array_equal(totals_RJ[:, 1], 10 * totals_RJ[:, 0])
    # every total is one of three draws with return out of 1, 2, 4; their mean is that of the sums
    possible = {a + b + c for a in (1, 2, 4) for b in (1, 2, 4) for c in (1, 2, 4)}
    assert set(totals_RJ[:, 0]) == possible
    assert totals_RJ[:, 0].mean() == pytest.approx(7, abs=0.2)
    again = resampled_totals(sums_PJ[:, :1], resamples=1500, seed=3)
    np.testing.assert_array_equal(again, totals_RJ[:, :1])


def test_resamples_without_a_value_are_left_out():
    values = np.array([1.0, np.nan, 1.0, np.inf])
    assert percentile_interval(1.0, values) == Interval(1.0, 1.0, 1.0)
    assert percentile_interval(1.0, np.array([1.0, np.nan, np.nan])) is None
    assert percentile_interval(float("nan"), values) is None
