"""Find what a run's metrics say about its health, as its rows come in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from selfteach.analysis.health_checks import health_warnings
from selfteach.analysis.run_data import Row, RunData
from selfteach.config.recipe import Recipe
from selfteach.trainer.guard import Guard, is_idle, learned_nothing, why_idle


class Findings:
    """Collects what a person should look at: health warnings, events of the guard, idle steps.

    Each kind is reported once, when it first shows.
    """

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        self._config = recipe.model_dump(mode="json")
        self._folder, self._guard, self._bounds = folder, Guard(recipe.guard), recipe.guard
        self._rows: list[Row] = []
        self._known: set[str] = set()
        self.lines: list[str] = []
        """All findings so far, a line each."""

    def new(self, row: Row) -> list[str]:
        """Take the next row of metrics; return the lines of what it shows for the first time."""
        if row["kind"] != "step":
            return []
        before = [earlier for earlier in self._rows if earlier["step"] < row["step"]]
        if len(before) < len(self._rows):  # a resumed run repeats the steps after its checkpoint
            self._guard = Guard(self._bounds)
            for earlier in before:
                self._guard.observe(earlier)
        self._rows = [*before, row]
        new = list(self._unreported(row))
        self.lines += new
        return new

    def _unreported(self, row: Row) -> Iterator[str]:
        for event in self._guard.observe(row):
            verb = {"warn": "guard", "reduce_lr": "guard lowers the rate", "stop": "guard stops"}
            yield f"step {event.step}: {verb[event.action]}: {event.text}"
        if is_idle(row) and "idle" not in self._known:
            self._known.add("idle")
            yield f"step {row['step']}: nothing could be learned: {why_idle([row])}"
        run = RunData(self._folder, "", None, self._config, self._rows)
        for warning in health_warnings({"": [run]}):
            if warning.check.metric not in self._known:
                self._known.add(warning.check.metric)
                yield f"step {row['step']}: {warning.text}"

    @property
    def learned_nothing(self) -> str | None:
        """Return why no step so far could learn; None if one did, or there was none."""
        return why_idle(list(self._rows)) if learned_nothing(list(self._rows)) else None


def findings_of(recipe: Recipe, folder: Path, rows: Sequence[dict[str, Any]]) -> Findings:
    """Return the findings of all rows of a run."""
    findings = Findings(recipe, folder)
    for row in rows:
        findings.new(row)
    return findings
