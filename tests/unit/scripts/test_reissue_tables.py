"""The tables of the experiments hold what the stored evaluations and published figures give."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from script_files import load_script

ROOT = Path(__file__).parents[3]
EXPERIMENTS = ROOT / "experiments"
reissue = load_script(ROOT / "scripts" / "reissue_tables.py")


def test_the_tables_of_the_miniature_are_those_of_its_evaluations() -> None:
    folder = EXPERIMENTS / "paper_in_miniature"
    lines = [*reissue.study_lines(folder / "results" / "evaluations.tar.xz")]
    readme = (folder / "README.md").read_text(encoding="utf-8")
    main = lines[: next(i for i, line in enumerate(lines) if "ρ = 0" in line)]
    for arm in ("base", "grpo", "reference", "step_aligned"):
        row = next(line for line in main if line.startswith(f"| {arm} |"))
        rates = row.split(" | ")[:4]  # the README has lengths and the rest without intervals
        assert " | ".join(rates) in readme
    leads = [line for line in lines if line.startswith("| step_aligned − ")]
    for line in leads:
        if "− base" not in line:
            assert line.split(" | ")[2].removeprefix("+") in readme, line
    assert not any("higher" in line or "lower" in line for line in leads if "[−" in line)


@pytest.mark.parametrize(
    "name", ["what_in_the_feedback_matters", "smollm2_critic", "smollm2_chain_sums"]
)
def test_approximate_tables_are_those_of_the_published_figures(name: str) -> None:
    readme = (EXPERIMENTS / name / "README.md").read_text(encoding="utf-8")
    lines = [*reissue.published_lines(EXPERIMENTS / name / "published.toml")]
    assert "\n".join(lines) in readme


def test_a_stand_in_has_the_means_and_the_width_that_were_published() -> None:
    old = {"mean": 2.0, "ci95": [-1.92, 5.92]}  # a standard error of 2
    table = reissue.stand_in([1.0, 3.0], old, problems=192)
    np.testing.assert_allclose(table.mean(axis=1), [1.0, 3.0])
    # The bootstrap's variance of 4 is that of the seeds, with the divisor S, and the problems'.
    assert table.mean(axis=0).var() / 192 == pytest.approx(4 - 1 / 2, rel=1e-3)
    one = reissue.stand_in([2.0], old, problems=48)
    assert one.mean() == pytest.approx(2.0) and one.var() / 48 == pytest.approx(4, rel=1e-3)
