"""Test studies by degree: positions of arms or variants, and their figure."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from selfteach.analysis.figures.dose_response import along_axis, axis_lines
from selfteach.commands.inspect.folder import check_contexts, position
from selfteach.commands.study.run_study import inspection_of
from selfteach.config.recipe_file import study_from
from selfteach.errors import RecipeError

POSITIONS = (0.0, 0.4, 1.0)


def estimate(mean: float, half: float = 2.0) -> dict[str, Any]:
    return {"mean": mean, "ci95": [mean - half, mean + half]}


def dial(**study: Any) -> dict[str, Any]:
    arms = {
        f"dial_{i}": {"context": {"type": "partly_aligned", "alignment": x}}
        for i, x in enumerate(POSITIONS)
    }
    at = {f"dial_{i}": x for i, x in enumerate(POSITIONS)}
    return {
        "critic": {"type": "oracle"},
        "arms": {**arms, "grpo": {"objective": {"type": "grpo"}, "critic": False}},
        "study": {"axis": "alignment", "at": at, **study},
    }


def results_by_arm() -> dict[str, Any]:
    arms = {"base": {"avg": estimate(9)}, "grpo": {"avg": estimate(20)}}
    for i, x in reversed(list(enumerate(POSITIONS))):
        context = {"context": f"partly_aligned@{x:g}"}
        arms[f"dial_{i}"] = {"avg": estimate(40 + 30 * x, 3 + i), "settings": context}
    at = {f"dial_{i}": x for i, x in enumerate(POSITIONS)}
    return {"k": 12, "arms": arms, "axis": {"label": "alignment", "at": at}}


def results_by_variant() -> dict[str, Any]:
    def setting(pull: float) -> dict[str, Any]:
        return {
            "arms": {"reference": {"avg": estimate(80 - 40 * pull)}},
            "paired": {"step_aligned-reference": {"avg": estimate(40 * pull - 2)}},
        }

    at = {"main": 0.5, "low": 0.0, "high": 1.0}
    return {
        **setting(0.5),
        "k": 12,
        "headline": ["step_aligned-reference"],
        "axis": {"label": "pull", "at": at},
        "variants": {"low": setting(0.0), "high": setting(1.0)},
    }


def drawn(axes: Any) -> dict[str, tuple[list[float], list[float]]]:
    """Return the points of every line with error bars, by name."""
    lines = {}
    for bars in axes.containers:
        x, y = bars.lines[0].get_data()
        lines[bars.get_label()] = (np.asarray(x).tolist(), np.asarray(y).tolist())
    return lines


def test_arms_on_the_axis_are_one_line_and_others_are_horizontal() -> None:
    figure = along_axis(results_by_arm(), None)
    assert figure is not None
    (axes,) = figure.axes
    ((points),) = drawn(axes).values()
    assert points == ([0.0, 0.4, 1.0], [40.0, 52.0, 70.0])
    assert {text.get_text() for text in axes.texts} == {"base", "grpo"}


def test_intervals_are_those_of_the_results() -> None:
    figure = along_axis(results_by_arm(), None)
    assert figure is not None
    (bars,) = figure.axes[0].containers
    (segments,) = [lines.get_segments() for lines in bars.lines[2]]
    assert [(low[1], high[1]) for low, high in segments] == [(37, 43), (48, 56), (65, 75)]


def test_concentration_is_shown_where_every_position_was_inspected() -> None:
    contexts = {f"partly_aligned@{x:g}": {"concentration": estimate(1 + x)} for x in POSITIONS}
    figure = along_axis(results_by_arm(), {"contexts": contexts})
    assert figure is not None and len(figure.axes) == 2
    ((points),) = drawn(figure.axes[1]).values()
    assert points == ([0.0, 0.4, 1.0], [1.0, 1.4, 2.0])
    del contexts["partly_aligned@0.4"]
    figure = along_axis(results_by_arm(), {"contexts": contexts})
    assert figure is not None and len(figure.axes) == 1


def test_variants_are_a_line_per_arm_with_the_headline_differences_beside() -> None:
    figure = along_axis(results_by_variant(), None)
    assert figure is not None
    left, right = figure.axes
    assert drawn(left) == {"reference": ([0.0, 0.5, 1.0], [80.0, 60.0, 40.0])}
    assert drawn(right) == {"step_aligned - reference": ([0.0, 0.5, 1.0], [-2.0, 18.0, 38.0])}
    assert axis_lines(results_by_variant())[0] == "pull 0: reference 80.0"


@pytest.mark.parametrize("axis", [None, {"label": "x", "at": {"grpo": 0.0}}])
def test_without_two_positions_there_is_no_figure(axis: object) -> None:
    assert along_axis({**results_by_arm(), "axis": axis}, None) is None


def test_an_inspection_shows_every_position_of_the_arms() -> None:
    inspection = inspection_of(study_from(dial()))
    assert inspection is not None
    names = [name for name in inspection[1].contexts if name.startswith("partly_aligned")]
    assert names == ["partly_aligned@0", "partly_aligned@0.4", "partly_aligned@1"]


@pytest.mark.parametrize(
    ("study", "message"),
    [
        ({"axis": ""}, "give both, or neither"),
        ({"at": {}}, "give both, or neither"),
        ({"at": {"dial_0": 0.0, "dail_1": 1.0}}, "study.at: 'dial_0'"),
    ],
)
def test_a_wrong_axis_is_refused(study: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        study_from(dial(**study))


def test_positions_of_the_dial_have_names() -> None:
    names = ("partly_aligned@1", "reference", "partly_aligned@0.2", "partly_aligned@0.2")
    assert check_contexts(names) == ("reference", "partly_aligned@0.2", "partly_aligned@1")
    assert position("partly_aligned@0.2") == 0.2 and position("reference") is None
    for wrong in ("partly_aligned@1.2", "partly_aligned@half", "partly_aligned@nan"):
        with pytest.raises(RecipeError, match="from 0 to 1"):
            check_contexts([wrong])
    with pytest.raises(RecipeError, match=r"no context 'reference@0\.5'"):
        check_contexts(["reference@0.5"])
