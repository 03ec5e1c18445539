"""Test measures of localisation by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from inspections import answer, write
from scipy.stats import rankdata, spearmanr

from selfteach.analysis.figures import results_figures, style
from selfteach.analysis.inspection.inspection_data import example, read_inspection
from selfteach.analysis.inspection.inspection_summary import save_figures, summarize
from selfteach.analysis.inspection.localisation import aligned, localise, ranks
from selfteach.errors import CheckpointError

ANSWERS = [
    answer(
        "p",
        [0, 0, 1, 1, 2],
        first_error=1,
        correct=False,
        verbatim={"x": 1.0, "y": 0.0},
        contexts={"x": "so", "y": "no"},
    ),
    answer("q", [0, 1], first_error=None, correct=True, verbatim={"x": None}, contexts={"x": "so"}),
    answer("q", [-1, 0], first_error=None, correct=False, located=False, sample=1),
]
KINDS = {
    0: ["style", "task", "style", "task", "other"],
    1: ["task", "style"],
    2: ["other", "other"],
}
ADVANTAGES = {
    (0, "x"): [0.1, -0.1, -2.0, 0.5, -0.3],
    (1, "x"): [-1.5, 0.0],
    (2, "x"): [9.0, 9.0],  # its first error is unknown: in no region
    (0, "y"): [-0.5, -0.5, 0.5, 0.0, 0.0],
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "found", ["x", "y"], ANSWERS, ADVANTAGES, kinds=KINDS)


def mean(estimate) -> float:
    low, high = estimate["ci95"]
    assert low - 1e-9 <= estimate["mean"] <= high + 1e-9
    return estimate["mean"]


def test_measures_by_hand(folder: Path) -> None:
    measured = localise(read_inspection(folder))
    x = measured["contexts"]["x"]
    # |A| of the first answer: 0.2 before, 2.5 on the failing step, 0.3 after: 3.0 in all
    assert {k: mean(v) for k, v in x["mass"].items()} == pytest.approx(
        {"before": 100 / 15, "failing": 250 / 3, "after": 10}, rel=1e-6
    )
    assert {k: mean(v) for k, v in x["advantage"].items()} == pytest.approx(
        {"before": 0, "failing": -0.75, "after": -0.3, "right": -0.75}, abs=1e-6
    )
    assert mean(x["teacher_logratio_abs"]["failing"]) == pytest.approx(1.25)
    assert mean(x["concentration"]) == pytest.approx(1.25 / 0.1, rel=1e-6)
    assert mean(x["collateral"]) == pytest.approx(25)  # one of four tokens on right steps
    assert mean(x["hits"]) == pytest.approx(50)
    # style: 0.1, 2.0, 0.0; task: 0.1, 0.5, 1.5; on right steps 0.1, 0.0 and 0.1, 1.5
    assert mean(x["style_leak"]) == pytest.approx(0.7 / 0.7, rel=1e-6)
    assert mean(x["style_leak_correct_steps"]) == pytest.approx(0.05 / 0.8, rel=1e-6)
    assert (x["answers"], measured["with_first_error"], measured["without_error"]) == (3, 1, 1)


def test_differences_are_over_the_answers_that_both_contexts_have(folder: Path) -> None:
    measured = localise(read_inspection(folder))
    assert set(measured["paired"]) == {"y-x"}
    pair = measured["paired"]["y-x"]
    # of the first answer alone: y has 1.0 / 1.5 of its mass before the error, x 0.2 / 3.0
    assert mean(pair["mass"]["before"]) == pytest.approx(100 * (1 / 1.5 - 0.2 / 3), rel=1e-5)
    assert mean(pair["collateral"]) == 0
    assert pair["advantage"]["right"] is None, "y was not shown for the right answer"
    assert measured["contexts"]["y"]["advantage"]["right"] is None


def test_one_problem_leaves_nothing_to_resample(tmp_path: Path) -> None:
    folder = write(tmp_path, ["x"], [ANSWERS[0]], {(0, "x"): ADVANTAGES[0, "x"]}, kinds=KINDS)
    estimate = localise(read_inspection(folder))["contexts"]["x"]["concentration"]
    assert estimate["ci95"] == pytest.approx([12.5, 12.5], rel=1e-6)


def test_intervals_are_over_problems_not_answers(tmp_path: Path) -> None:
    """Ten answers to one problem are one observation: with two problems the interval is wide."""
    rows, advantages = [], {}
    for number in range(20):
        problem = "p" if number < 10 else "q"
        rows.append(answer(problem, [0, 1], first_error=1, correct=False, sample=number))
        advantages[number, "x"] = [0.0, -1.0 if number < 10 else -3.0]
    inspection = read_inspection(write(tmp_path, ["x"], rows, advantages))
    estimate = localise(inspection)["contexts"]["x"]["advantage"]["failing"]
    assert estimate == {"mean": -2.0, "ci95": [-3.0, -1.0]}


def test_aligned_on_the_first_error(folder: Path) -> None:
    curve = aligned(read_inspection(folder), 0, resamples=50, window=2)
    assert curve["offsets"] == [-2, -1, 0, 1, 2]
    assert [value["mean"] for value in curve["advantage"]] == pytest.approx(
        [0.1, -0.1, -2.0, 0.5, -0.3]
    )
    assert curve["answers"] == [1] * 5


def test_fidelity_against_concentration(tmp_path: Path) -> None:
    share = [0.0, 0.0, 0.5, 0.5, 1.0, 1.0]
    before = [1.0, 2.0, 0.9, 0.5, 0.1, 0.6]
    rows = [
        answer(f"p{i}", [0, 1], first_error=1, correct=False, verbatim={"x": s})
        for i, s in enumerate(share)
    ]
    advantages = {(i, "x"): [b, -1.0] for i, b in enumerate(before)}
    measured = localise(read_inspection(write(tmp_path, ["x"], rows, advantages)))["contexts"]["x"][
        "verbatim"
    ]
    expected = spearmanr(share, [1 / b for b in before]).statistic
    assert mean(measured["spearman"]) == pytest.approx(expected, rel=1e-6)
    assert mean(measured["mean"]) == 50
    assert {k: v["answers"] for k, v in measured["by_share"].items()} == {
        "none": 2,
        "some": 2,
        "all": 2,
    }
    assert mean(measured["by_share"]["all"]["concentration"]) == pytest.approx(1 / 0.35, rel=1e-6)


def test_a_share_that_never_varies_has_no_correlation(folder: Path) -> None:
    assert localise(read_inspection(folder))["contexts"]["x"]["verbatim"]["spearman"] is None


def test_ranks_are_scipys() -> None:
    values = np.array([3.0, 1.0, 3.0, 2.0, 3.0, 1.0])
    np.testing.assert_array_equal(ranks(values), rankdata(values))


def test_the_example_and_all_figures(folder: Path) -> None:
    shown = example(folder, answer=0)
    assert shown is not None and shown["first_error_token"] == 2
    assert shown["steps"] == [0, 0, 1, 1, 2] and list(shown["contexts"]) == ["x", "y"]
    assert shown["contexts"]["y"]["advantage"] == pytest.approx(ADVANTAGES[0, "y"])
    assert list(example(folder, answer=1, contexts=["x"])["contexts"]) == ["x"]  # type: ignore[index]
    assert "first error" in style.svg(results_figures.token_advantages(shown))


def test_an_unfinished_or_unknown_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no finished inspection"):
        read_inspection(tmp_path / "nothing")
    (folder / "inspection.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(CheckpointError, match="format 99, expected 1"):
        read_inspection(folder)


def test_a_folder_without_errors_can_be_summed_up(tmp_path: Path) -> None:
    folder = write(tmp_path, ["x"], ANSWERS[1:2], {(0, "x"): [0.0, 0.1]}, kinds={0: KINDS[1]})
    measured = summarize(folder)
    assert measured["contexts"]["x"]["concentration"] is None
    assert save_figures(folder, measured) == []
