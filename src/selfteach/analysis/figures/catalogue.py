"""Draw the figures of a report, each with a description for readers who cannot see it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
from selfteach.analysis.health_checks import HealthCheck, is_logged
from selfteach.analysis.report_data import ReportData


@dataclass(frozen=True, slots=True)
class Drawing:
    """Holds a figure, the same one for a phone, and their description."""

    figure: style.Figure
    label: str
    is_saved: bool = True
    """Whether it is also written as files."""
    phone: style.Figure | None = None
    """None where the figure itself fits a phone, or cannot be narrower."""

    def inline(self, name: str) -> dict[str, Any]:
        """Return the figures as SVG for a page, and their description."""
        phone = None if self.phone is None else Markup(style.svg(self.phone, f"{name}-phone"))
        svg = Markup(style.svg(self.figure, name))
        return {"svg": svg, "phone": phone, "label": f"{self.label}."}


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
    if dose_response.along_axis(results, data.localisation) is not None:
        title = f"Avg@k along {results['axis']['label']}"
        drawings |= _drawn(
            "axis", dose_response.along_axis, results, data.localisation,
            label=_described(title, dose_response.axis_lines(results)),
        )  # fmt: skip
    if results["paired"]:
        label = _described("Differences with intervals", results_text.pair_lines(results))
        drawings |= _drawn("forest", results_figures.forest, results, label=label)
    if any("curve" in arm for arm in results["arms"].values()):
        label = _described("Learning curves", results_text.curve_lines(results))
        drawings |= _drawn("learning_curves", results_figures.learning_curves, results, label=label)
    return drawings


def _training(data: ReportData) -> dict[str, Drawing]:
    label = "Pass at k on test problems against k"
    drawings = _drawn("pass_at_k", training_curves.pass_at_each_k, data.arms, label=label)
    if is_logged(data.arms, "correct") or is_logged(data.arms, "loss"):
        label = "Share of correct rollouts and loss over training"
        drawings |= _drawn("training", training_curves.training, data.arms, label=label)
    if is_logged(data.arms, "length") or is_logged(data.arms, "entropy"):
        drawings |= _drawn(
            "length_and_entropy", training_curves.length_and_entropy, data.arms,
            label="Length and entropy of rollouts over training",
        )  # fmt: skip
    return drawings


def _localisation(data: ReportData) -> dict[str, Drawing]:
    drawings, localisation = dict[str, Drawing](), data.localisation
    if localisation is not None and localisation["with_first_error"]:
        drawings |= _drawn(
            "aligned_advantage", localisation_figures.aligned_advantage, localisation,
            label="Mean advantage around the first wrong step, a panel per context",
        )  # fmt: skip
        drawings |= _drawn(
            "mass_by_region", localisation_figures.mass_by_region, localisation,
            label="Share of |advantage| before, on and after the first wrong step",
        )  # fmt: skip
    if localisation is not None and localisation["step_scores"]["contexts"]:
        drawings |= _drawn(
            "judges", localisation_figures.step_detection, localisation,
            label="How well each context detects wrong steps",
        )  # fmt: skip
    return drawings


def _example(data: ReportData) -> dict[str, Drawing]:
    if data.example is None or not data.example["contexts"]:
        return {}
    figure = results_figures.token_advantages(data.example)
    lines = results_text.advantage_lines(data.example)
    return {"token_advantages": Drawing(figure, _described("Advantage of each token", lines))}


def _health(data: ReportData) -> dict[str, Drawing]:
    """Draw the metric of each failure mode over training; small, for the page alone."""
    return {
        f"health_{check.metric}": Drawing(
            training_curves.check_curve(*data.drawn_for(check)),
            _described(f"{check.title} over training", _warning_lines(data, check)),
            is_saved=False,
        )
        for check, logged in data.checks
        if logged
    }


def _warning_lines(data: ReportData, check: HealthCheck) -> list[str]:
    warnings = [warning for warning in data.warnings if warning.check.metric == check.metric]
    return [f"{w.arm} seed {w.seed} warns at step {w.step}" for w in warnings] or ["no warning"]


def _budget(data: ReportData) -> dict[str, Drawing]:
    label = "Seconds by phase and arm; the table has the numbers"
    return _drawn("seconds", training_curves.seconds_by_phase, data.budgets, label=label)


def _drawn(
    name: str, draw: Callable[..., style.Figure | None], *data: Any, label: str
) -> dict[str, Drawing]:
    """Return a drawing and its form for a phone, by its name; nothing if there is nothing to draw."""
    figure = draw(*data)
    return {} if figure is None else {name: Drawing(figure, label, phone=draw(*data, phone=True))}


def _described(title: str, lines: Sequence[str]) -> str:
    return f"{title}: {'; '.join(lines)}"
