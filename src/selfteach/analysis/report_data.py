"""Define the record of everything that a report shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from selfteach.analysis.critic_statistics import ArmCritic
from selfteach.analysis.explanations import arm_meanings, is_lab
from selfteach.analysis.health_checks import (
    HealthCheck,
    HealthWarning,
    all_checks,
    is_logged,
    warnings_by_check,
)
from selfteach.analysis.recipe_differences import Differences, differences
from selfteach.analysis.results_text import Results, claims, ordered_pairs
from selfteach.analysis.run_data import Groups, RunData


@dataclass(frozen=True, slots=True)
class ReportData:
    """Holds everything that a report shows, read once; all its sections and figures take it.

    Each part may be missing: a run alone has no inspection, an inspection alone has no runs.
    """

    results: Results
    runs: Sequence[RunData]
    """All runs, those of variants too."""
    arms: Groups
    """Runs of the main setting by arm, in the order of the results."""
    variant_arms: Groups
    """Runs of the variants by arm."""
    budgets: Mapping[str, Mapping[str, float]]
    """What each arm spent, mean per run (`run_budget.arm_budget`)."""
    gains: Mapping[str, Mapping[str, Any] | None]
    """What training changed in each arm (`run_comparison.training_gain`); empty if pairs exist."""
    warnings: Sequence[HealthWarning]
    critics: Mapping[str, ArmCritic]
    localisation: Mapping[str, Any] | None
    """localisation.json of an inspection."""
    example: Mapping[str, Any] | None
    """One answer under several contexts (`inspection_data.example`)."""
    answers: Sequence[dict[str, Any]]
    """Records of the answers in the browser (`report.answer_records`)."""
    num_answers: int
    """How many answers there are in all; ``answers`` may be a selection."""

    @property
    def pairs(self) -> list[str]:
        """Return all pairs of the main setting, the headline's first."""
        return ordered_pairs(self.results, self.results)

    @property
    def arm_meanings(self) -> dict[str, str]:
        """Return what each row of the results learns from."""
        return arm_meanings(self.results, self.arms)

    @property
    def differences(self) -> Differences | None:
        """Return the settings in which the arms differ, without the untrained model."""
        arms = {name: runs for name, runs in self.arms.items() if runs[0].steps > 0}
        return differences(arms)

    @property
    def is_lab(self) -> bool:
        """Return whether problems, answers and critiques are in the lab's notation."""
        shown = [self.example["question"]] if self.example else []
        return is_lab(self.arms, [*shown, *(answer["question"] for answer in self.answers[:1])])

    @property
    def claims(self) -> list[dict[str, Any]]:
        """Return the sentences at the top of the report."""
        return claims(self.results, self.gains)

    @property
    def unfinished(self) -> list[RunData]:
        """Return the runs that are not complete yet."""
        return [run for run in self.runs if not run.is_complete]

    @property
    def has_feedback(self) -> bool:
        """Return whether the page on feedback has anything to show."""
        return bool(self.localisation or self.example or self.critics)

    @property
    def warnings_by_check(self) -> list[tuple[HealthCheck, dict[str, list[HealthWarning]]]]:
        """Return warnings by check and arm."""
        return warnings_by_check(self.warnings)

    @property
    def checks(self) -> list[tuple[HealthCheck, bool]]:
        """Return every health check, with whether its metric was logged."""
        groups = {**self.arms, **self.variant_arms}
        return [(check, is_logged(groups, check.metric)) for check in all_checks()]

    def drawn_for(self, check: HealthCheck) -> tuple[Groups, HealthCheck, list[HealthWarning]]:
        """Return what the curve of a check shows: arms, the check, and the warnings among their runs.

        The main setting's arms, and of the variants' those with a warning; all of these where the main
        setting has not logged the metric.
        """
        warnings = [w for w in self.warnings if w.check.metric == check.metric]
        arms = {w.arm for w in warnings}
        if not is_logged(self.arms, check.metric):
            arms.update(self.variant_arms)
        more = {name: runs for name, runs in self.variant_arms.items() if name in arms}
        return {**self.arms, **more}, check, warnings
