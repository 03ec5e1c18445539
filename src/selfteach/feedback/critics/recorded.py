"""Critiques of an earlier run, for answers that are the same to the letter."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from selfteach.errors import CriticError
from selfteach.runtime.run_folder import critique_from
from selfteach.types import Critique, CritiqueFailure, Rollout, Usage, Verdict


class RecordedCritic:
    """Replays what a run's (or all of a study's runs') critics said.

    Raises `CriticError` if the folder holds no critiques.
    """

    def __init__(self, folder: Path) -> None:
        self._known: dict[tuple[str, str], Critique | CritiqueFailure] = {}
        for path in sorted(
            [*folder.rglob("samples/step_*.jsonl"), *folder.rglob("lessons/step_*.jsonl")]
        ):
            for row in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
                said = critique_from(row["critique"])
                if said is not None:
                    self._known[row["question"], row["answer"]] = replace(said, usage=Usage())
        if not self._known:
            raise CriticError(f"critic.run = {str(folder)!r}: no critiques are recorded there")

    def __call__(
        self, judged: Sequence[tuple[Rollout, Verdict]]
    ) -> list[Critique | CritiqueFailure]:
        """What was said of the same answer to the same question, or that nothing was."""
        missing = CritiqueFailure("unrecorded", "the recorded run had no such answer")
        return [self._known.get((r.problem.question, r.text), missing) for r, _ in judged]
