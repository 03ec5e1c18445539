"""Replays critiques of an earlier run for rollouts with the same text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from selfteach.errors import CriticError
from selfteach.runtime.stored_files import read_bytes, read_lines, reading
from selfteach.runtime.stored_records import critique_from, history_rows
from selfteach.types import Critique, CritiqueFailure, Rollout, Usage, Verdict


class RecordedCritic:
    """Replays the critiques of a run, or of all runs of a study.

    Raises `CriticError` if the folder holds no critiques.
    """

    def __init__(self, folder: Path) -> None:
        self._critiques: dict[tuple[str, str, str], Critique | CritiqueFailure] = {}
        for path in sorted(
            [*folder.rglob("samples/step_*.jsonl"), *folder.rglob("lessons/step_*.jsonl")]
        ):
            rows, _ = read_lines(read_bytes(path) or b"", path)
            with reading(path):
                for row in rows:
                    critique = critique_from(row["critique"])
                    if critique is not None:
                        key = _key(row.get("history", []), row["question"], row["answer"])
                        self._critiques[key] = replace(critique, usage=Usage())
        if not self._critiques:
            raise CriticError(f"critic.run = {str(folder)!r}: no critiques are recorded there")

    def __call__(
        self, judged: Sequence[tuple[Rollout, Verdict]]
    ) -> list[Critique | CritiqueFailure]:
        """Return the recorded critique of each rollout's question and text, or that there is none."""
        missing = CritiqueFailure("unrecorded", "the recorded run has no rollout with this text")
        return [
            self._critiques.get(
                _key(history_rows(rollout.problem), rollout.problem.question, rollout.text), missing
            )
            for rollout, _ in judged
        ]


def _key(history: list[dict[str, str]], question: str, text: str) -> tuple[str, str, str]:
    return json.dumps(history, sort_keys=True), question, text
