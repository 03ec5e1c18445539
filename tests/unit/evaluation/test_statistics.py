"""Measures and intervals: golden values, slow references, properties and coverage."""

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
    bootstrap_difference,
    bootstrap_mean,
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


# -- bootstrap -------------------------------------------------------------------------------


def test_an_interval_without_spread_is_a_point():
    interval = bootstrap_mean(np.full((3, 5), 40.0), resamples=50, seed=0)
    np.testing.assert_allclose([interval.mean, interval.low, interval.high], 40.0)


def test_the_mean_is_that_of_the_data_and_the_seed_decides_the_draws():
    values_SP = np.random.default_rng(0).random((3, 10))
    first, again, other = (bootstrap_mean(values_SP, resamples=200, seed=s) for s in (1, 1, 2))
    assert first == again != other
    assert first.mean == other.mean == values_SP.mean()
    assert first.low < first.mean < first.high


def test_one_row_or_column_still_varies_over_the_other_axis():
    column = np.array([[0.0], [100.0]])
    # Two seeds, one problem: a resampled mean is 0, 50 or 100 with 1/4, 1/2, 1/4.
    assert bootstrap_mean(column, resamples=2000, seed=0) == Interval(50.0, 0.0, 100.0)
    assert bootstrap_mean(column.T, resamples=2000, seed=0) == Interval(50.0, 0.0, 100.0)
    assert bootstrap_mean(np.array([[3.0]]), resamples=10, seed=0) == Interval(3.0, 3.0, 3.0)


def test_cached_draws_equal_new_ones(monkeypatch):
    values_SP = np.random.default_rng(4).random((2, 30))
    cached = [bootstrap_mean(values_SP + i, resamples=100, seed=7) for i in range(2)]
    assert statistics._cached_draws((2, 30), 100, 7) is statistics._cached_draws((2, 30), 100, 7)
    monkeypatch.setattr(statistics, "MAX_CACHED_COUNTS", 0)
    assert cached == [bootstrap_mean(values_SP + i, resamples=100, seed=7) for i in range(2)]
    assert cached[0] != bootstrap_mean(values_SP, resamples=100, seed=8)


def test_blocks_of_resamples_are_all_drawn(monkeypatch):
    monkeypatch.setattr(statistics, "BLOCK", 3)  # 3000 resamples in 1000 blocks
    values_SP = np.random.default_rng(3).normal(size=(1, 400))
    interval = bootstrap_mean(values_SP, resamples=3000, seed=0)
    # One seed: the plain bootstrap, whose standard error is std / sqrt(P).
    half = 1.96 * values_SP.std() / np.sqrt(400)
    np.testing.assert_allclose(interval.high - interval.low, 2 * half, rtol=0.08)


def test_spread_between_seeds_is_too_small_by_the_documented_factor():
    # Problems do not matter here: S values a_s, whose bootstrap variance is their var / S with the
    # divisor S where an unbiased one has S - 1. Averaged over many data sets the ratio is (S-1)/S.
    rng = np.random.default_rng(5)
    num_seeds, ratios = 3, []
    for trial in range(200):
        values_SP = np.repeat(rng.normal(size=(num_seeds, 1)), 2, axis=1)
        interval = bootstrap_mean(values_SP, resamples=500, seed=trial)
        ratios.append(((interval.high - interval.low) / 2 / 1.96) ** 2 * num_seeds)
    np.testing.assert_allclose(np.mean(ratios), (num_seeds - 1) / num_seeds, rtol=0.12)


def test_noise_of_cells_enters_with_the_documented_factor():
    # Owen: iid noise of variance 1 in each cell has a true variance of the mean of 1 / (S P).
    rng, num_seeds, num_problems = np.random.default_rng(6), 4, 30
    variances = []
    for trial in range(100):
        values_SP = rng.normal(size=(num_seeds, num_problems))
        interval = bootstrap_mean(values_SP, resamples=400, seed=trial)
        variances.append(((interval.high - interval.low) / 2 / 1.96) ** 2)
    factor = (2 - 1 / num_seeds) * (2 - 1 / num_problems) - 1
    expected = factor / (num_seeds * num_problems)
    np.testing.assert_allclose(np.mean(variances), expected, rtol=0.12)


def test_intervals_cover_the_truth_at_about_their_level():
    # Avg@12 of 60 problems under 6 seeds: the truth is 0, problems and seeds both vary.
    rng, hits, trials = np.random.default_rng(7), 0, 200
    for trial in range(trials):
        problems_P, seeds_S = rng.normal(0, 20, 60), rng.normal(0, 4, 6)
        values_SP = seeds_S[:, None] + problems_P + rng.normal(0, 10, (6, 60))
        interval = bootstrap_mean(values_SP, resamples=400, seed=trial)
        hits += interval.low <= 0 <= interval.high
    assert 0.90 <= hits / trials <= 0.985


def test_the_paired_interval_is_narrower_where_arms_share_their_problems():
    rng = np.random.default_rng(8)
    shared_P = rng.normal(50, 25, 80)
    a_SP, b_SP = (shared_P + rng.normal(shift, 5, (4, 80)) for shift in (3, 0))
    paired = bootstrap_difference(a_SP, b_SP, resamples=1000, seed=0)
    a, b = (bootstrap_mean(v_SP, resamples=1000, seed=0) for v_SP in (a_SP, b_SP))
    unpaired = np.hypot(a.high - a.low, b.high - b.low)
    assert paired.high - paired.low < unpaired / 4
    assert paired.mean == pytest.approx(a.mean - b.mean)
    assert 0 < paired.low < 3 < paired.high


def test_a_difference_from_nothing_is_the_mean_itself():
    a_SP = np.random.default_rng(10).random((3, 8))
    for resamples in (5, 50):
        alone = bootstrap_mean(a_SP, resamples=resamples, seed=1)
        assert bootstrap_difference(a_SP, 0 * a_SP, resamples=resamples, seed=1) == alone


def test_swapping_the_arms_mirrors_the_interval():
    rng = np.random.default_rng(9)
    a_SP, b_SP = rng.random((2, 3, 20))
    forth = bootstrap_difference(a_SP, b_SP, resamples=500, seed=4)
    back = bootstrap_difference(b_SP, a_SP, resamples=500, seed=4)
    np.testing.assert_allclose(
        [back.mean, back.low, back.high], [-forth.mean, -forth.high, -forth.low], atol=1e-12
    )


# -- refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [0, -1, 4])
def test_pass_at_k_refuses_more_draws_than_answers(k):
    with pytest.raises(ValueError, match="n = 3"):
        pass_at_k(np.ones((2, 3)), k)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (4,)])
def test_tables_must_hold_something(shape):
    for refuse in (
        lambda: avg_at_k(np.zeros(shape)),
        lambda: bootstrap_mean(np.zeros(shape), resamples=10, seed=0),
    ):
        with pytest.raises(ValueError, match="not empty"):
            refuse()


def test_votes_and_verdicts_must_have_one_shape():
    with pytest.raises(ValueError, match="zip"):
        maj_at_k([["7", "3"]], np.ones((1, 3)))
    with pytest.raises(ValueError, match="zip"):
        maj_at_k([["7"]], np.ones((2, 1)))


def test_the_bootstrap_refuses_values_without_a_mean():
    with pytest.raises(ValueError, match="1 values that are not finite"):
        bootstrap_mean(np.array([[1.0, np.nan]]), resamples=10, seed=0)
    with pytest.raises(ValueError, match="at least 1"):
        bootstrap_mean(np.ones((1, 2)), resamples=0, seed=0)


def test_pairs_need_the_same_seeds_and_problems():
    with pytest.raises(ValueError, match=r"\(2, 3\) and \(3, 3\)"):
        bootstrap_difference(np.ones((2, 3)), np.ones((3, 3)), resamples=10, seed=0)


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


def test_a_mean_of_totals_has_the_interval_of_bootstrap_mean():
    """With one seed both are the plain bootstrap over problems."""
    values_P = np.random.default_rng(0).normal(size=60)
    rows = np.stack([values_P, np.ones(60)], axis=1)
    totals_RJ = resampled_totals(rows, resamples=20_000, seed=0)
    ours = percentile_interval(values_P.mean(), totals_RJ[:, 0] / totals_RJ[:, 1])
    theirs = bootstrap_mean(values_P[None], resamples=20_000, seed=1)
    assert ours is not None
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.01)


def test_resamples_without_a_value_are_left_out():
    values = np.array([1.0, np.nan, 1.0, np.inf])
    assert percentile_interval(1.0, values) == Interval(1.0, 1.0, 1.0)
    assert percentile_interval(1.0, np.array([1.0, np.nan, np.nan])) is None
    assert percentile_interval(float("nan"), values) is None
