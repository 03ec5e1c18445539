"""Counts of critiques against the true first error, by hand; Wilson's interval against its formula."""

from __future__ import annotations

from typing import Any

import pytest

from selfteach.analysis.critic_truth import CriticTruth, count_truth, share

FAILED = {"reason": "wrong_answer", "detail": "", "usage": {}}


def row(truth: int | None, critic: int | str | None) -> dict[str, Any]:
    critique = FAILED if critic == "failed" else {"case": "D", "first_error": critic}
    return {"true_first_error": truth, "critique": critique}


def test_counts_of_a_hand_made_table() -> None:
    rows = [
        row(2, 2), row(0, 0),  # located
        row(2, 1),  # a right step is changed
        row(1, 3), row(1, None),  # the wrong step is repeated
        row(1, "failed"),
        row(None, None), row(None, 0), row(None, "failed"),
        {"true_first_error": 1, "critique": None},  # not sent to the critic
    ]  # fmt: skip
    assert count_truth(rows) == CriticTruth(
        faulty=6, faulty_usable=5, located=2, early=1, late=2, sound=3, sound_usable=2, alarms=1
    )


def test_every_usable_critique_of_a_faulty_rollout_is_counted_once() -> None:
    rows = [row(t, c) for t in range(3) for c in (None, 0, 1, 2, 3, "failed")]
    truth = count_truth(rows)
    assert truth is not None
    assert truth.located + truth.early + truth.late == truth.faulty_usable == 15
    assert (truth.faulty, truth.sound) == (18, 0)


def test_without_a_checking_program_there_is_nothing_to_count() -> None:
    assert count_truth([{"critique": {"case": "A", "first_error": None}}]) is None
    assert count_truth([]) is None


def test_wilson_interval() -> None:
    interval = share(8, 10)
    assert interval is not None
    # Wilson (1927) for 8 of 10, as in R: prop.test(8, 10, correct = FALSE)
    assert (interval.mean, interval.low, interval.high) == pytest.approx(
        (0.8, 0.4901625, 0.9433178), abs=1e-6
    )
    none, all_ = share(0, 5), share(5, 5)
    assert none is not None and none.low == pytest.approx(0) and 0 < none.high < 1
    assert all_ is not None and all_.high == pytest.approx(1) and 0 < all_.low < 1
    assert share(0, 0) is None
