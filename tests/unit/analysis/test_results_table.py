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
    table = results_table(arms, ["b-a"], resamples=100)
    assert table["arms"]["a"]["avg"]["mean"] == 50
    assert table["arms"]["a"]["avg"]["per_seed"] == {"0": 25.0, "1": 75.0}
    # Every problem gains the same: the interval has no width.
    gain = {"mean": 25.0, "ci95": [25.0, 25.0]}
    assert table["paired"] == {"b-a": dict.fromkeys(COMPARED, gain)}


def test_curve_and_settings_are_absent_without_them() -> None:
    curve = {"steps": [0, 1], "avg": {"0": [1.0, 2.0]}}
    arms = {"base": arm([1, 2]), "mine": arm([1, 2], curve=curve, settings={"optimizer.lr": 1e-3})}
    table = results_table(arms, [], resamples=10)["arms"]
    assert [*table["base"]] == [*MEASURES, "budget"]
    assert table["mine"]["curve"] == curve and table["mine"]["settings"] == {"optimizer.lr": 1e-3}


def test_seeds_with_other_problems_are_pooled_but_not_paired() -> None:
    uneven, even = arm([0, 0, 0], [100]), arm([0, 0], [1, 1])
    assert uneven.values("avg").tolist() == [[0, 0, 0, 100]]
    with pytest.raises(ValueError, match="equal shapes"):
        results_table({"a": even, "b": uneven}, ["b-a"], resamples=10)


def test_a_run_without_a_budget_entry_counts_0() -> None:
    budgets = [{"tokens_sampled": 4, "critiques": 2}, {"tokens_sampled": 6}]
    assert mean_budget(budgets) == {"tokens_sampled": 5.0, "critiques": 1.0}
