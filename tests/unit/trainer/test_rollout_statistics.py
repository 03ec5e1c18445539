"""Repetition, hesitation, and which tokens are taught: by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfteach.trainer.rollout_statistics import eos_in_loss, frac_in_loss, hesitations, repetition
from selfteach.types import (
    CritiquedRollout,
    Problem,
    Rollout,
    TokenWeights,
    TrainingSample,
    Verdict,
)


def sample(*, finished: bool = True, length: int = 3) -> TrainingSample:
    rollout = Rollout(
        Problem("p", "q", "a"), 0, (1,), (2,) * length, (-1.0,) * length, "", finished, 0
    )
    return TrainingSample(CritiquedRollout(rollout, Verdict(False, True, None), None))


@pytest.mark.parametrize(
    ("ids", "n", "expected"),
    [
        ([1, 2, 1, 2, 1], 2, 0.5),  # (1 2) (2 1), then both again
        ([1, 2, 3, 4], 2, 0.0),
        ([7] * 6, 3, 0.75),  # four times the same: one of them is new
        ([1, 2], 4, 0.0),  # too short to repeat anything
        ([], 4, 0.0),
    ],
)
def test_repetition_is_the_share_of_ngrams_seen_before(ids, n, expected):
    assert repetition(ids, n) == pytest.approx(expected, abs=1e-12)


@given(st.lists(st.integers(0, 3), max_size=40), st.integers(1, 5))
def test_repetition_stays_below_one_and_saying_it_twice_never_lowers_it(ids, n):
    once = repetition(ids, n)
    assert 0 <= once < 1
    assert repetition([*ids, *ids], n) >= once - 1e-12


def test_hesitation_is_words_not_letters():
    assert hesitations("Wait, hmm: 3 + 4 = 8? Actually 7. Let me check: let me recheck.") == 5
    assert hesitations("He awaited the waiter; factually, maybeline.") == 0


def test_taught_counts_answers_with_a_token_that_counts():
    assert frac_in_loss([TokenWeights((0.0, 1.0)), TokenWeights((0.0, 0.0))]) == 0.5
    assert frac_in_loss([]) == 0.0


def test_the_end_counts_only_where_it_was_written_and_weighs_something():
    whole, from_error, cut = (1.0, 1.0, 1.0), (0.0, 1.0, 0.0), (1.0, 1.0, 1.0)
    samples = [sample(), sample(), sample(finished=False), sample()]
    token_weights = [TokenWeights(w) for w in (whole, from_error, cut, (0.0, 0.0, 0.0))]
    # Three answers count; the second's end weighs nothing, the third has none.
    assert eos_in_loss(samples, token_weights) == pytest.approx(1 / 3)
    assert eos_in_loss(samples[3:], token_weights[3:]) is None
