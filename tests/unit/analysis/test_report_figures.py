"""Test that figures show what they are of: no empty panels, no hidden runs, no shared colours."""

from __future__ import annotations

import json
import warnings
from itertools import combinations
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from matplotlib.figure import Figure

from selfteach.analysis import explanations, health_checks, recipe_differences, results_text
from selfteach.analysis.figures import (
    localisation_figures,
    results_figures,
    style,
    training_curves,
)
from selfteach.analysis.figures.palette import PALETTE
from selfteach.analysis.run_data import group_runs, read_run
from selfteach.config.recipe import ContextName

CONTEXTS = [*get_args(ContextName), "my_context", "./mine.py:context", "another"]


def run(folder: Path, steps: int, *, seed: int = 0, lr: float = 1e-3, **metrics: Any) -> Path:
    """Write a run's folder; ``metrics`` are constants, or one value per step."""
    folder.mkdir(parents=True)
    config = {
        "seed": seed, "context": {"type": "reference"}, "optimizer": {"lr": lr},
        "train": {"steps": steps}, "evaluation": {"every": 6},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    rows = [
        {
            "step": s,
            "kind": "step",
            **{k: v[s - 1] if np.ndim(v) else v for k, v in metrics.items()},
        }
        for s in range(1, steps + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def groups_of(*folders: Path) -> dict[str, Any]:
    return group_runs([read_run(folder) for folder in folders])


def linear(colour: str) -> np.ndarray:
    rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def oklab(rgb: np.ndarray) -> np.ndarray:
    lms = rgb @ np.array(
        [[0.4122, 0.5363, 0.0514], [0.2119, 0.6807, 0.1074], [0.0883, 0.2817, 0.63]]
    ).T  # fmt: skip
    mixed = [[0.2105, 0.7936, -0.0041], [1.978, -2.4286, 0.4506], [0.0259, 0.7828, -0.8087]]
    return np.cbrt(np.clip(lms, 0, None)) @ np.array(mixed).T


SIGHT = {
    "ordinary": np.eye(3),
    "protanopia": [[0.1523, 1.0526, -0.2049], [0.1145, 0.7863, 0.0992], [-0.0039, -0.0481, 1.052]],
    "deuteranopia": [[0.3673, 0.8606, -0.228], [0.2801, 0.6725, 0.0474], [-0.0118, 0.0429, 0.9689]],
    "tritanopia": [[1.2555, -0.0767, -0.1788], [-0.0784, 0.9308, 0.1476], [0.0047, 0.6914, 0.3039]],
}
"""Machado, Oliveira and Fernandes (2009), severity 1, for linear RGB."""


@pytest.mark.parametrize("sight", SIGHT)
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_any_two_colours_are_told_apart(sight: str, theme: str) -> None:
    seen = [
        oklab(np.clip(np.array(SIGHT[sight]) @ linear(getattr(colour, theme)), 0, 1))
        for colour in PALETTE
    ]
    assert min(float(np.linalg.norm(a - b)) for a, b in combinations(seen, 2)) > 0.05


@pytest.mark.parametrize(("theme", "page"), [("light", "#fdfdfc"), ("dark", "#1f2226")])
def test_every_colour_has_contrast_with_its_page(theme: str, page: str) -> None:
    weights = np.array([0.2126, 0.7152, 0.0722])
    of_page = float(linear(page) @ weights)
    for colour in PALETTE:
        low, high = sorted((float(linear(getattr(colour, theme)) @ weights), of_page))
        assert (high + 0.05) / (low + 0.05) >= 3, colour


def test_no_two_contexts_share_a_colour() -> None:
    look = style.styles(CONTEXTS)
    assert len({s.colour for s in look.values()}) == len(CONTEXTS)
    assert look["other_reference"].colour not in (look["reference"].colour, look["peer"].colour)
    assert look["environment"] == style.styles(["environment"])["environment"]
    # A name of one's own keeps its colour when others join it.
    assert look["my_context"] == style.styles(["my_context", "grpo", "base"])["my_context"]
    many = style.styles([f"arm_{i}" for i in range(80)])
    assert len({(s.dash, s.marker) for s in many.values()}) == 80
    assert len({s.colour for s in style.styles(f"arm_{i}" for i in range(20)).values()}) == 20


def test_inline_figures_take_the_colours_of_the_page() -> None:
    figure = Figure()
    axes = figure.add_subplot()
    axes.plot([0, 1], [0, 1], color=style.styles(["peer"])["peer"].colour)
    axes.axhline(0, color=style.ALERT)
    drawn = style.svg(figure)
    number = style.NAMES.index("peer")
    assert f"var(--series-{number})" in drawn and "var(--alert)" in drawn
    assert PALETTE[number].light not in drawn
    assert f"--series-{number}: light-dark({PALETTE[number].light}, " in style.theme_colours()


# -- empty panels ----------------------------------------------------------------------------


def estimate(mean: float) -> dict[str, Any]:
    return {"mean": mean, "ci95": [mean - 1, mean + 1]}


def localisation(f1: dict[str, Any] | None, answers: int = 0) -> dict[str, Any]:
    """Return an inspection's measures of two contexts, the second without any."""
    curve = {
        "offsets": [-1, 0, 1], "answers": [answers] * 3, "advantage": [estimate(-1.0)] * 3,
    }  # fmt: skip
    none = {"offsets": [0], "answers": [0], "advantage": [None]}
    regions = ("before", "failing", "after")
    score = {"tells": "where", "auroc": estimate(0.9), "f1": f1, "locates": estimate(80.0)}
    return {
        "contexts": {
            "reference": {"aligned": curve, "mass": dict.fromkeys(regions, estimate(30.0))},
            "peer": {"aligned": none, "mass": dict.fromkeys(regions)},
        },
        "step_scores": {
            "contexts": {"reference": score},
            "baselines": {"position": {**score, "f1": None}},
        },
    }


@pytest.mark.parametrize("phone", [False, True])
def test_a_measure_without_values_has_no_panel(phone: bool) -> None:
    figure = localisation_figures.step_detection(localisation(None), phone=phone)
    assert figure is not None
    assert [axes.get_xlabel() for axes in figure.axes] == ["area under the ROC curve"]
    both = localisation_figures.step_detection(localisation(estimate(40.0)), phone=phone)
    assert both is not None and len(both.axes) == 2
    without = localisation(None)
    for score in (*without["step_scores"]["contexts"].values(),
                  *without["step_scores"]["baselines"].values()):  # fmt: skip
        score["auroc"] = None
    assert localisation_figures.step_detection(without, phone=phone) is None


def test_a_context_without_a_curve_has_no_panel() -> None:
    figure = localisation_figures.aligned_advantage(localisation(None, answers=20))
    assert figure is not None
    shown = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title(loc="left") for axes in shown] == ["reference"]
    assert localisation_figures.aligned_advantage(localisation(None, answers=19)) is None
    masses = localisation_figures.mass_by_region(localisation(None))
    assert masses is not None
    assert [t.get_text() for t in masses.axes[0].get_yticklabels()] == ["reference"]


def test_only_logged_metrics_have_a_panel(tmp_path: Path) -> None:
    groups = groups_of(run(tmp_path / "a", 12, correct=0.2, length=9.0))
    assert [a.get_ylabel() for a in training_curves.training(groups).axes] == ["share right"]
    lengths = training_curves.length_and_entropy(groups, phone=True)
    assert [a.get_ylabel() for a in lengths.axes] == ["length, tokens"]
    assert lengths.get_figwidth() == style.PHONE_WIDTH


# -- single points ---------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 4, 6])
def test_short_runs_are_drawn_step_by_step_at_whole_steps(tmp_path: Path, steps: int) -> None:
    groups = groups_of(run(tmp_path / "a", steps, correct=0.2, loss=0.1))
    figure = training_curves.training(groups)
    figure.draw_without_rendering()
    for axes in figure.axes:
        assert len(axes.get_lines()[0].get_xdata()) == steps
        assert axes.get_xlabel() == "training step"
        low, high = axes.get_xlim()
        assert high - low >= 1
        ticks = [tick for tick in axes.get_xticks() if low <= tick <= high]
        assert ticks and all(float(tick).is_integer() for tick in ticks)


def test_pass_at_k_needs_two_points(tmp_path: Path) -> None:
    folder = run(tmp_path / "a", 2, correct=0.2)
    (folder / "evaluations").mkdir()
    for k in (2, 3):
        saved = {
            "split": "test", "step": 2, "k": k, "problem_ids": ["p"], "correct": [[True] * k],
            "formatted": [[True] * k], "finished": [[True] * k], "parsed": [["1"] * k],
            "lengths": [[3] * k],
        }  # fmt: skip
        (folder / "evaluations" / "test_000002.json").write_text(json.dumps(saved))
        drawn = training_curves.pass_at_each_k(groups_of(folder))
        assert (drawn is not None) == (k == 3)


# -- warned runs -----------------------------------------------------------------------------


def warned_curve(groups: dict[str, Any], metric: str) -> Figure:
    warned = [w for w in health_checks.health_warnings(groups) if w.check.metric == metric]
    assert warned
    return training_curves.check_curve(groups, warned[0].check, warned)


def lines_of(figure: Figure) -> dict[str, Any]:
    return {line.get_label(): line for line in figure.axes[0].get_lines()}


def test_the_run_of_a_warning_is_drawn_beside_its_arms_mean(tmp_path: Path) -> None:
    late = [0.0] * 6 + [0.9] * 6
    groups = groups_of(
        run(tmp_path / "arm" / "seed_0", 12, truncated=0.0),
        run(tmp_path / "arm" / "seed_1", 12, seed=1, truncated=late),
        run(tmp_path / "arm" / "seed_2", 3, seed=2, truncated=0.0),  # the mean ends here
    )
    lines = lines_of(warned_curve(groups, "truncated"))
    assert max(lines["arm, seed 1"].get_ydata()) == pytest.approx(0.9)
    assert lines["warning"].get_ydata()[0] == pytest.approx(0.9)
    low, high = warned_curve(groups, "truncated").axes[0].get_xlim()
    assert low <= lines["warning"].get_xdata()[0] <= high


def test_a_run_without_numbers_is_drawn_as_a_line_across(tmp_path: Path) -> None:
    groups = groups_of(run(tmp_path / "arm", 3, loss=[float("nan")] * 3))
    lines = lines_of(warned_curve(groups, "loss"))
    assert set(lines["arm: no number"].get_xdata()) == {3}


def test_of_many_arms_the_warned_one_is_named(tmp_path: Path) -> None:
    folders = [run(tmp_path / f"arm{i}", 12, lr=i + 1.0, truncated=0.0) for i in range(20)]
    folders.append(run(tmp_path / "bad", 12, truncated=0.5))
    lines = lines_of(warned_curve(groups_of(*folders), "truncated"))
    names = {name for name in lines if not name.startswith("_")}
    assert names == {"bad", "other arms", "threshold", "warning"}


# -- clipped texts ---------------------------------------------------------------------------


def long_results(arms: int, name: str = "a_rather_long_name_of_an_arm_with_its_rate") -> dict:
    names = [f"{name}_{i}" for i in range(arms)]
    value = {"avg": {"mean": 5.0, "ci95": [-20.0, 25.0]}}
    paired = {f"{b}-{a}": value for a, b in combinations(names, 2)}
    curve = {"steps": [0, 10, 20], "avg": {"0": [10.0, 20.0, 30.0]}}
    title = "a setting with quite a long title " * 4
    return {
        "arms": {n: {"avg": {"mean": 10.0 + i, "ci95": [5.0, 30.0]}, "curve": curve}
                 for i, n in enumerate(names)},
        "paired": paired, "headline": [], "k": 4, "seeds": [0],
        "variants": {"v": {"title": title, "arms": {}, "paired": paired, "seeds": [0]}},
    }  # fmt: skip


@pytest.mark.parametrize("phone", [False, True])
@pytest.mark.parametrize("arms", [2, 5, 24])
def test_no_text_reaches_over_the_edge_of_a_figure(arms: int, phone: bool) -> None:
    results = long_results(arms)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns when there is no room for the axes
        for draw in (results_figures.forest, results_figures.learning_curves):
            figure = draw(results, phone=phone)
            figure.draw_without_rendering()
            drawn = figure.get_tightbbox()
            assert drawn.x0 >= -0.02 and drawn.x1 <= figure.get_figwidth() + 0.02, draw


@pytest.mark.parametrize("phone", [False, True])
def test_nothing_crosses_the_headings_of_a_forest(phone: bool) -> None:
    figure = results_figures.forest(long_results(3), phone=phone)
    figure.draw_without_rendering()
    headings = [axes.title for axes in figure.axes] + [axes._left_title for axes in figure.axes]
    headings = [text for text in headings if text.get_text()]
    assert len(headings) == 2
    texts = [*headings, *(text for axes in figure.axes for text in axes.texts)]
    for text in texts:
        box = text.get_window_extent()
        for axes in figure.axes:
            for line in axes.get_lines():
                at = line.get_window_extent()
                is_across = at.x0 <= box.x1 and at.x1 >= box.x0
                assert not (is_across and at.y0 < box.y1 - 1 and at.y1 > box.y0 + 1), (
                    text.get_text()
                )


def test_a_forest_of_many_arms_without_a_base_is_not_empty() -> None:
    figure = results_figures.forest({**long_results(24), "variants": {}})
    assert len(figure.axes[0].get_yticklabels()) == 23
    (claim,) = results_text.claims(long_results(24), {})
    assert "24 rows make 276 pairs" in claim["numbers"] and not claim["decided"]


# -- words -----------------------------------------------------------------------------------


def test_every_context_and_measure_is_explained() -> None:
    assert set(get_args(ContextName)) <= explanations.CONTEXTS.keys()
    assert explanations.MEASURES.keys() == results_text.MEASURE_TITLES.keys()
    assert explanations.context_meaning("partly_aligned@0.4") is not None


def test_differing_settings_are_found_by_key(tmp_path: Path) -> None:
    a, b = run(tmp_path / "a", 4), run(tmp_path / "b", 4, lr=0.5)
    for folder, version in ((a, "2.1"), (b, "2.2")):
        (folder / "environment.json").write_text(json.dumps({"versions": {"torch": version}}))
    config = json.loads((b / "config.json").read_text())
    config["critic"] = {"type": "oracle"}
    (b / "config.json").write_text(json.dumps(config))
    differing = recipe_differences.differences(groups_of(a, b))
    assert differing is not None and list(differing.arms) == ["a", "b"]
    assert differing.rows["optimizer.lr"] == ["0.001", "0.5"]
    assert differing.rows["critic.type"] == ["–", "oracle"]
    assert differing.rows["made with torch"] == ["2.1", "2.2"]
    assert not any(key.startswith(("context", "train", "seed")) for key in differing.rows)
    assert differing.same >= 3
