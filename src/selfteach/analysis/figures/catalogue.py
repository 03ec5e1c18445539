"""The report's figures, each with what it shows in words for those who do not see it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from selfteach.analysis import health, wording
from selfteach.analysis.figures import curves, dose_response, localisation_figures, style
from selfteach.analysis.run_data import Groups
from selfteach.analysis.wording import Results


@dataclass(frozen=True, slots=True)
class Drawing:
    """A figure and its description."""

    figure: style.Figure
    label: str
    filed: bool = True
    """Whether it is also written as a file of its own."""

    def inline(self, name: str) -> dict[str, Any]:
        """The figure as SVG to stand inside a page, and its description."""
        return {"svg": Markup(style.svg(self.figure, name)), "label": f"{self.label}."}


def of_results(
    results: Results, groups: Groups, localisation: Mapping[str, Any] | None = None
) -> dict[str, Drawing]:
    """What arms have come to, and how they got there."""
    drawn: dict[str, Drawing] = {}
    if (along := dose_response.along_axis(results, localisation)) is not None:
        title = f"Avg@k along {results['axis']['label']}"
        drawn["axis"] = _told(along, title, dose_response.axis_lines(results))
    if results["paired"]:
        lines = wording.pair_lines(results)
        drawn["forest"] = _told(style.forest(results), "Differences with intervals", lines)
    if any("curve" in arm for arm in results["arms"].values()):
        lines = wording.curve_lines(results)
        drawn["learning_curves"] = _told(style.learning_curves(results), "Learning curves", lines)
    if (by_k := curves.pass_at_each_k(groups)) is not None:
        drawn["pass_at_k"] = Drawing(by_k, "Pass at k on test problems against k")
    if health.logged(groups, "correct"):
        drawn["training"] = Drawing(
            curves.training(groups), "Share of right answers and loss over training"
        )
        drawn["length_and_entropy"] = Drawing(
            curves.length_and_entropy(groups), "Length and entropy of answers over training"
        )
    return drawn


def of_feedback(
    example: Mapping[str, Any] | None, localisation: Mapping[str, Any] | None
) -> dict[str, Drawing]:
    """Where contexts move the self-teacher: over all answers, and in one."""
    drawn: dict[str, Drawing] = {}
    if localisation is not None and localisation["with_first_error"]:
        drawn["aligned_advantage"] = Drawing(
            localisation_figures.aligned_advantage(localisation),
            "Mean advantage around the first wrong step, a panel per context",
        )
        drawn["mass_by_region"] = Drawing(
            localisation_figures.mass_by_region(localisation),
            "Share of the advantages' size before, on and after the first wrong step",
        )
    if localisation is not None and localisation["step_scores"]["contexts"]:
        drawn["judges"] = Drawing(
            localisation_figures.judges(localisation), "How well each context judges steps"
        )
    if example is not None and example["contexts"]:
        lines = wording.advantage_lines(example)
        drawn["token_advantages"] = _told(
            style.token_advantages(example), "Advantage of each token", lines
        )
    return drawn


def of_health(groups: Groups) -> dict[str, Drawing]:
    """The metric of each failure mode over training; small, for the page alone."""
    return {
        f"health_{check.metric}": Drawing(
            curves.check_curve(groups, check), f"{check.title} over training", filed=False
        )
        for check in health.checks()
        if health.logged(groups, check.metric)
    }


def of_budget(groups: Groups) -> dict[str, Drawing]:
    """Where the seconds went."""
    seconds = curves.seconds_by_phase(groups)
    label = "Seconds by phase and arm; the table has the numbers"
    return {} if seconds is None else {"seconds": Drawing(seconds, label)}


def _told(figure: style.Figure, title: str, lines: Sequence[str]) -> Drawing:
    return Drawing(figure, f"{title}: {'; '.join(lines)}")
