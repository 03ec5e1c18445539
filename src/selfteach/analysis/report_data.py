"""Define the record of everything that a report shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from selfteach.analysis.critic_statistics import ArmCritic
from selfteach.analysis.health_checks import (
    HealthCheck,
    HealthWarning,
    all_checks,
    is_logged,
    warnings_by_check,
)
from selfteach.analysis.results_text import Results, claims
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
        return [(check, is_logged(self.arms, check.metric)) for check in all_checks()]
