"""Draw the figures of a report, each with a description for readers who cannot see it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from selfteach.analysis import results_text
from selfteach.analysis.figures import (
    dose_response,
    localisation_figures,
    results_figures,
    style,
    training_curves,
)
from selfteach.analysis.health_checks import is_logged
from selfteach.analysis.report_data import ReportData


@dataclass(frozen=True, slots=True)
class Drawing:
    """Holds a figure and its description."""

    figure: style.Figure
    label: str
    is_saved: bool = True
    """Whether it is also written as files."""

    def inline(self, name: str) -> dict[str, Any]:
        """Return the figure as SVG for a page, and its description."""
        return {"svg": Markup(style.svg(self.figure, name)), "label": f"{self.label}."}


def draw_figures(data: ReportData) -> dict[str, Drawing]:
    """Draw every figure that the data has something to show in, by name."""
    return {
        **_results(data),
        **_training(data),
        **_localisation(data),
        **_example(data),
        **_health(data),
        **_budget(data),
    }


def _results(data: ReportData) -> dict[str, Drawing]:
    results, drawings = data.results, dict[str, Drawing]()
    if (along_axis := dose_response.along_axis(results, data.localisation)) is not None:
        title = f"Avg@k along {results['axis']['label']}"
        drawings["axis"] = _described(along_axis, title, dose_response.axis_lines(results))
    if results["paired"]:
        forest, lines = results_figures.forest(results), results_text.pair_lines(results)
        drawings["forest"] = _described(forest, "Differences with intervals", lines)
    if any("curve" in arm for arm in results["arms"].values()):
        curves, lines = results_figures.learning_curves(results), results_text.curve_lines(results)
        drawings["learning_curves"] = _described(curves, "Learning curves", lines)
    return drawings


def _training(data: ReportData) -> dict[str, Drawing]:
    drawings: dict[str, Drawing] = {}
    if (by_k := training_curves.pass_at_each_k(data.arms)) is not None:
        drawings["pass_at_k"] = Drawing(by_k, "Pass at k on test problems against k")
    if is_logged(data.arms, "correct"):
        drawings["training"] = Drawing(
            training_curves.training(data.arms), "Share of correct rollouts and loss over training"
        )
        if (rewards := training_curves.rewards(data.arms)) is not None:
            drawings["rewards"] = Drawing(rewards, "Rewards of the training rollouts")
        drawings["length_and_entropy"] = Drawing(
            training_curves.length_and_entropy(data.arms),
            "Length and entropy of rollouts over training",
        )
    return drawings


def _localisation(data: ReportData) -> dict[str, Drawing]:
    drawings, localisation = dict[str, Drawing](), data.localisation
    if localisation is not None and localisation["with_first_error"]:
        drawings["aligned_advantage"] = Drawing(
            localisation_figures.aligned_advantage(localisation),
            "Mean advantage around the first wrong step, a panel per context",
        )
        drawings["mass_by_region"] = Drawing(
            localisation_figures.mass_by_region(localisation),
            "Share of |advantage| before, on and after the first wrong step",
        )
    if localisation is not None and localisation["step_scores"]["contexts"]:
        drawings["judges"] = Drawing(
            localisation_figures.step_detection(localisation),
            "How well each context detects wrong steps",
        )
    return drawings


def _example(data: ReportData) -> dict[str, Drawing]:
    if data.example is None or not data.example["contexts"]:
        return {}
    figure = results_figures.token_advantages(data.example)
    lines = results_text.advantage_lines(data.example)
    return {"token_advantages": _described(figure, "Advantage of each token", lines)}


def _health(data: ReportData) -> dict[str, Drawing]:
    """Draw the metric of each failure mode over training; small, for the page alone."""
    return {
        f"health_{check.metric}": Drawing(
            training_curves.check_curve(data.arms, check),
            f"{check.title} over training",
            is_saved=False,
        )
        for check, logged in data.checks
        if logged
    }


def _budget(data: ReportData) -> dict[str, Drawing]:
    seconds = training_curves.seconds_by_phase(data.budgets)
    label = "Seconds by phase and arm; the table has the numbers"
    return {} if seconds is None else {"seconds": Drawing(seconds, label)}


def _described(figure: style.Figure, title: str, lines: Sequence[str]) -> Drawing:
    return Drawing(figure, f"{title}: {'; '.join(lines)}")
