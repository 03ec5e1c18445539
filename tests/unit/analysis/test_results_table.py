"""Test the table of results by hand."""

from __future__ import annotations

import numpy as np
import pytest

from selfteach.analysis.results_table import (
    COMPARED,
    MEASURES,
    ArmMeasurements,
    mean_budget,
    results_table,
)


def arm(*values_by_seed: list[float], **more) -> ArmMeasurements:
    per_problem = {
        seed: dict.fromkeys(MEASURES, np.array(values, dtype=float))
        for seed, values in enumerate(values_by_seed)
    }
    return ArmMeasurements(per_problem, **{"budgets": [{}], **more})


def test_means_per_seed_and_differences_by_hand() -> None:
    arms = {"a": arm([0, 50], [50, 100]), "b": arm([25, 75], [75, 125])}
    table = results_table(arms, ["b-a"])
    assert table["arms"]["a"]["avg"]["mean"] == 50
    assert table["arms"]["a"]["avg"]["per_seed"] == {"0": 25.0, "1": 75.0}
    # Every problem gains the same, but two problems do not tell what others would gain.
    assert [*table["paired"]["b-a"]] == [*COMPARED]
    gain = table["paired"]["b-a"]["avg"]
    assert (gain["mean"], gain["ci95"], gain["seeds"]) == (25.0, [-100.0, 100.0], 2)
    assert table["paired"]["b-a"]["length"] == {"mean": 25.0, "ci95": [25.0, 25.0], "seeds": 2}
    assert table["intervals"] == "student"


def test_curve_and_settings_are_absent_without_them() -> None:
    curve = {"steps": [0, 1], "avg": {"0": [1.0, 2.0]}}
    arms = {"base": arm([1, 2]), "mine": arm([1, 2], curve=curve, settings={"optimizer.lr": 1e-3})}
    table = results_table(arms, [])["arms"]
    assert [*table["base"]] == [*MEASURES, "budget"]
    assert table["mine"]["curve"] == curve and table["mine"]["settings"] == {"optimizer.lr": 1e-3}


def test_seeds_with_other_problems_are_averaged_but_not_paired() -> None:
    uneven, even = arm([0, 0, 0], [100]), arm([0, 0], [1, 1])
    estimate = results_table({"a": uneven}, [])["arms"]["a"]["avg"]
    assert (estimate["mean"], estimate["ci95"], estimate["seeds"]) == (50.0, [0.0, 100.0], 2)
    for b, a in ((uneven, even), (uneven, uneven)):
        with pytest.raises(ValueError, match="seeds and problems in common"):
            results_table({"a": a, "b": b}, ["b-a"])


def test_a_run_without_a_budget_entry_counts_0() -> None:
    budgets = [{"tokens_sampled": 4, "critiques": 2}, {"tokens_sampled": 6}]
    assert mean_budget(budgets) == {"tokens_sampled": 5.0, "critiques": 1.0}
