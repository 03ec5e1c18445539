"""Test step scores by hand, against brute force, and against scikit-learn."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from inspections import answer, write
from sklearn.metrics import roc_auc_score

from selfteach.analysis.inspection.inspection_data import read_inspection
from selfteach.analysis.inspection.step_scores import (
    Steps,
    auroc,
    best_threshold,
    choosing,
    f1,
    flagged_first,
    lowest,
    score_steps,
    solved,
    steps_of,
)

# Three answers: the first wrong in its second step, the second sound, the third wrong at once.
STEPS = Steps(
    answer_S=np.array([0, 0, 0, 1, 1, 2]),
    index_S=np.array([0, 1, 2, 0, 1, 0]),
    first_error_A=np.array([1, -1, 0]),
    problem_A=np.array([0, 1, 1]),
)
SCORE = np.array([-0.1, -2.0, -3.0, -0.2, -1.0, -1.5])


def test_by_hand() -> None:
    assert STEPS.failing_S.tolist() == [False, True, False, False, False, True]
    assert STEPS.counted_S.tolist() == [True, True, False, True, True, True]
    assert flagged_first(STEPS, SCORE, -1.2).tolist() == [1, -1, 0]
    assert flagged_first(STEPS, SCORE, -0.15).tolist() == [1, 0, 0]
    assert lowest(STEPS, SCORE).tolist() == [2, 1, 0]
    # erroneous, solved, sound, solved, lowest is the first error
    assert solved(STEPS, SCORE, -1.2).tolist() == [[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]]
    assert solved(STEPS, SCORE, -0.15).tolist() == [[1, 1, 0, 0, 0], [1, 1, 1, 0, 1]]


def test_f1_is_the_harmonic_mean_of_both_accuracies() -> None:
    # 3 of 4 erroneous, 1 of 2 sound: 2 · 0.75 · 0.5 / 1.25
    assert f1(np.array([[4.0, 3, 2, 1], [4, 0, 2, 0], [4, 4, 2, 2]])) == pytest.approx([60, 0, 100])
    assert np.isnan(f1(np.array([[4.0, 3, 0, 0]]))).all(), "without sound answers there is none"


def test_poolings_by_hand(tmp_path: Path) -> None:
    rows = [answer("p", [0, 0, 0, 0, 1], first_error=1, correct=False)]
    a = {(0, "x"): [-1.0, 0.5, 0.2, -0.5, -4.0]}
    inspection = read_inspection(write(tmp_path, ["x"], rows, a, logp={0: [-1.0, -2, -3, -4, -5]}))
    steps, scores = steps_of(inspection, 0)
    assert (steps.answer_S.tolist(), steps.index_S.tolist()) == ([0, 0], [0, 1])
    first = {name: value[0] for name, value in scores.items()}
    expected = {"min": -1, "mean": -0.2, "sum": -0.8, "last": -0.5, "first_3": -0.1,
                "negative": -1.5 / 4}  # fmt: skip
    assert {k: first[f"advantage.{k}"] for k in expected} == pytest.approx(expected, rel=1e-6)
    assert scores["student_logp.mean"].tolist() == [-2.5, -5]
    assert scores["student_entropy.sum"].tolist() == [-4, -1]
    assert scores["position.late"].tolist() == [0, -1]
    assert all(value[1] == pytest.approx(-4) for k, value in scores.items() if "advantage" in k)


def test_only_answers_with_a_known_first_error_are_judged(tmp_path: Path) -> None:
    rows = [
        answer("p", [-1, 0], first_error=None, correct=False, located=False),
        answer("q", [-1, 0, 1], first_error=None, correct=True),
    ]
    inspection = read_inspection(
        write(tmp_path, ["x"], rows, {(0, "x"): [1, 2], (1, "x"): [1, 2, 3]})
    )
    steps, scores = steps_of(inspection, 0)
    assert steps.answer_S.tolist() == [1, 1] and scores["advantage.min"].tolist() == [2, 3]


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.tuples(st.integers(-3, 3), st.booleans(), st.integers(0, 3)), min_size=2, max_size=30
    )
)
def test_the_area_is_scikit_learns(rows: list[tuple[int, bool, int]]) -> None:
    score, failing, weight = (np.array(column) for column in zip(*rows, strict=True))
    ours = auroc(score * 1.0, failing, np.stack([np.ones(len(rows)), weight * 1.0]))
    for value, weights in zip(ours, (np.ones(len(rows)), weight), strict=True):
        if weights[failing].sum() > 0 and weights[~failing].sum() > 0:
            positive = weights > 0
            theirs = roc_auc_score(
                failing[positive], -score[positive], sample_weight=weights[positive]
            )
            assert value == pytest.approx(theirs)
        else:
            assert np.isnan(value)


answers = st.lists(
    st.tuples(st.lists(st.integers(-4, 4), min_size=1, max_size=4), st.integers(-1, 3)),
    min_size=1, max_size=8,
)  # fmt: skip


@settings(deadline=None, max_examples=100)
@given(answers, st.integers(0, 2))
def test_the_best_threshold_is_the_best_there_is(rows, left_out: int) -> None:
    rows = [(scores, min(error, len(scores) - 1)) for scores, error in rows]
    steps = Steps(
        np.repeat(np.arange(len(rows)), [len(s) for s, _ in rows]),
        np.concatenate([np.arange(len(s)) for s, _ in rows]),
        np.array([error for _, error in rows]),
        np.arange(len(rows)),
    )
    score = np.concatenate([np.array(s, dtype=float) for s, _ in rows])
    chosen = np.arange(len(rows)) >= left_out
    if not chosen.any():
        return

    def value(threshold: float) -> float:
        return float(np.nan_to_num(f1(solved(steps, score, threshold)[chosen].sum(0)[None]))[0])

    best = max(value(t) for t in [*(np.arange(-5, 6) - 0.5), np.inf])
    assert value(best_threshold(steps, score, chosen)) == pytest.approx(best)


def planted(tmp_path: Path, contexts: dict[str, float], problems: int = 40) -> Path:
    """Write an inspection: failing steps have an advantage of −strength, all else is noise."""
    rng = np.random.default_rng(0)
    rows, advantages, logp, entropy = [], {}, {}, {}
    for i in range(2 * problems):
        error = int(rng.integers(3)) if i % 2 else None
        rows.append(answer(f"p{i // 2}", [0, 0, 1, 1, 2, 2], first_error=error,
                           correct=error is None, sample=i % 2))  # fmt: skip
        for name, strength in contexts.items():
            a = rng.normal(0, 0.1, 6)
            if error is not None:
                a[2 * error + 1] -= strength
            advantages[i, name] = a.tolist()
        logp[i], entropy[i] = (-rng.random((2, 6))).tolist()
    return write(tmp_path, list(contexts), rows, advantages, logp=logp, entropy=entropy)


def test_a_planted_signal_is_found_and_noise_is_not(tmp_path: Path) -> None:
    report = score_steps(
        read_inspection(planted(tmp_path, {"step_aligned": 3.0, "reference": 0.0}))
    )
    sharp, blunt = report["contexts"]["step_aligned"], report["contexts"]["reference"]
    assert sharp["pooling"] != "advantage.first_3" and sharp["tells"] == "where"
    assert (
        sharp["auroc"]["mean"] == sharp["f1"]["mean"] / 100 == sharp["locates"]["mean"] / 100 == 1
    )
    low, high = blunt["auroc"]["ci95"]
    assert low < 0.5 < high
    assert sharp["erroneous"] == sharp["sound"] == report["judged"]
    gain = report["paired"]["step_aligned-student_entropy"]
    assert gain["auroc"]["ci95"][0] > 0 and gain["f1"]["ci95"][0] > 0
    assert set(report["baselines"]) == {"student_logp", "student_entropy", "position"}
    assert report["choosing"] + report["judged"] == 40


def test_held_out_problems_do_not_affect_the_choice(tmp_path: Path) -> None:
    """Where only ``last`` works on the held-out problems, the choice is unchanged."""
    inspection = read_inspection(planted(tmp_path, {"x": 3.0}))
    inspection = dataclasses.replace(inspection, advantage_N=inspection.advantage_N.copy())
    before = score_steps(inspection)["contexts"]["x"]
    judged = ~choosing(inspection)[inspection.problem_A][inspection.answer_N]
    first = judged & (inspection.position_N % 2 == 0)
    inspection.advantage_N[first] = -10 - np.random.default_rng(1).random(first.sum())
    after = score_steps(inspection)["contexts"]["x"]
    assert (after["pooling"], after["threshold"]) == (before["pooling"], before["threshold"])
    assert before["auroc"]["mean"] == 1 and after["auroc"]["mean"] < 0.8
    assert after["poolings"]["advantage.last"] == {"choosing": 1, "judged": 1}


def test_too_few_problems_judge_nothing(tmp_path: Path) -> None:
    rows = [answer("p", [0, 1], first_error=1, correct=False)]
    report = score_steps(read_inspection(write(tmp_path, ["x"], rows, {(0, "x"): [0, -1.0]})))
    assert report["contexts"] == {} and report["baselines"] == {}
