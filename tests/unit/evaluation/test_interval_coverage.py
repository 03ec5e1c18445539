"""Simulate studies with a known truth: how often do 95 % intervals cover it?

Axis letters: T trials, S seeds, P problems.
"""

from __future__ import annotations

import numpy as np
import pytest

from selfteach.evaluation.intervals import Limits, difference_limits, mean_limits

UNIT = (0.0, 1.0)
K = 12
TRUTH_DRAWS = 400_000
SLOW_TRIALS, FAST_TRIALS = 4000, 1000
SAME, DIFFERENT = 0.0, 0.03
"""Standard deviation between seeds, as a share."""


class Study:
    """Samples tables of values [T, S, P] of one kind of study, and knows what their mean would be."""

    def __init__(self, kind: str, spread: float) -> None:
        self.kind, self.spread = kind, spread
        self.rng = np.random.default_rng([len(kind), round(1000 * spread)])

    def rates(self, problems: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Return chances to be right: what the problem has, plus the seed's and the cell's share."""
        if self.kind == "pass":
            problems = np.full_like(problems, 0.99)
        seeds = self.rng.normal(0, self.spread, (*shape[:2], 1))
        cells = 0 if self.kind == "pass" else self.rng.normal(0, 0.05, shape)
        return np.clip(problems + seeds + cells, 0, 1)

    def problems(self, trials: int, problems: int) -> np.ndarray:
        a, b = (5.0, 1.0) if self.kind == "high mean" else (1.0, 1.0)
        return self.rng.beta(a, b, (trials, 1, problems))

    def truth(self) -> float:
        if self.kind == "difference":
            return 0.0
        drawn = self.problems(TRUTH_DRAWS, 1)
        return float(self.rates(drawn, (TRUTH_DRAWS, 1, 1)).mean())

    def sample(self, shape: tuple[int, int, int]) -> np.ndarray:
        problems = self.problems(shape[0], shape[2])
        k = 1 if self.kind == "pass" else K  # whether any of k is right, at once
        return self.rng.binomial(k, self.rates(problems, shape)) / k

    def limits(self, shape: tuple[int, int, int]) -> Limits:
        if self.kind != "difference":
            return mean_limits(self.sample(shape), bounds=UNIT)
        problems = self.problems(shape[0], shape[2])  # the same for both arms
        a, b = (self.rng.binomial(K, self.rates(problems, shape)) / K for _ in "ab")
        return difference_limits(a - b, bounds=UNIT)


def coverage(kind: str, spread: float, seeds: int, problems: int, trials: int) -> float:
    """Return in percent how often the intervals of simulated studies cover the truth."""
    study = Study(kind, spread)
    limits = study.limits((trials, seeds, problems))
    return 100 * float(((limits.low <= study.truth()) & (study.truth() <= limits.high)).mean())


CELLS = [
    (kind, spread, seeds, problems)
    for kind in ("mean", "high mean", "difference", "pass")
    for spread in (SAME, DIFFERENT)
    for seeds in (2, 3, 5)
    for problems in (30, 100, 200)
]


def greatest(kind: str, seeds: int) -> float:
    """Return the coverage that is allowed at most: above 97 % only where the docstring says so."""
    if kind == "pass":
        return 99.8  # near 100 % an interval can only end at a few values
    return 98.8 if seeds == 2 else 97.5


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "spread", "seeds", "problems"), CELLS)
def test_intervals_cover_the_truth_at_their_level(kind, spread, seeds, problems):
    measured = coverage(kind, spread, seeds, problems, SLOW_TRIALS)
    assert 93.0 <= measured <= greatest(kind, seeds)


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize(
    ("kind", "spread"), [("mean", DIFFERENT), ("difference", DIFFERENT), ("pass", SAME)]
)
def test_intervals_over_thirty_problems_cover_the_truth(kind, spread, seeds):
    measured = coverage(kind, spread, seeds, 30, FAST_TRIALS)
    assert 93.0 <= measured <= greatest(kind, seeds) + 0.7


@pytest.mark.parametrize(("seeds", "problems"), [(2, 192), (3, 192), (5, 192)])
def test_without_an_effect_one_difference_in_twenty_excludes_zero(seeds, problems):
    """The bootstrap starred 25, 20 and 12 % of such differences."""
    starred = 100 - coverage("difference", DIFFERENT, seeds, problems, FAST_TRIALS)
    assert 3.0 <= starred <= 7.0


def test_an_interval_of_one_seed_covers_its_own_run_only():
    """What one seed cannot know: with a spread of 3 points two of five such intervals miss."""
    assert coverage("difference", SAME, 1, 200, FAST_TRIALS) > 93
    assert coverage("difference", DIFFERENT, 1, 200, FAST_TRIALS) < 60


@pytest.mark.parametrize("problems", [30, 192])
def test_intervals_near_one_hundred_percent_stay_narrow(problems):
    """They cover the truth of 99 %, and are not much wider than Wilson's of one seed."""
    study = Study("pass", SAME)
    limits = study.limits((FAST_TRIALS, 5, problems))
    width = np.median(limits.high - limits.low)
    assert width < 1.2 * 3.84 / (problems + 3.84)
