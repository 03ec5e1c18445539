"""Holds the verdicts of an evaluation and its metrics per problem; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from selfteach.errors import CheckpointError
from selfteach.evaluation.intervals import PERCENT, Bounds
from selfteach.evaluation.statistics import avg_at_k, maj_at_k, pass_at_k
from selfteach.runtime.checksums import Checksums
from selfteach.runtime.stored_files import read_json, reading

RATES = ("avg", "pass", "maj", "truncated", "format")
"""Metrics in percent; ``length`` is in tokens."""


def bounds_of(metric: str) -> Bounds:
    """Return the bounds of a metric of `Evaluation.per_problem`; None for a length."""
    return PERCENT if metric in RATES else None


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Holds k verified rollouts of each of P problems; every list is [P][k]."""

    split: str
    step: int
    k: int
    problem_ids: list[str]
    correct: list[list[bool]]
    formatted: list[list[bool]]
    parsed: list[list[str | None]]
    finished: list[list[bool]]
    lengths: list[list[int]]
    rewards: list[list[float | None]] | None = None
    """Total rewards; None without ``reward.success``, or where a rollout has none."""

    def per_problem(self) -> dict[str, np.ndarray]:
        """Return avg, pass, maj, truncated and format in percent, length in tokens; each [P]."""
        correct_PK = np.array(self.correct, dtype=float)
        values = {
            "avg": avg_at_k(correct_PK),
            "pass": pass_at_k(correct_PK, self.k),
            "maj": maj_at_k(self.parsed, correct_PK),
            "truncated": 1 - np.array(self.finished, dtype=float).mean(1),
            "format": np.array(self.formatted, dtype=float).mean(1),
            "length": np.array(self.lengths, dtype=float).mean(1),
        }
        return {name: value * (100 if name in RATES else 1) for name, value in values.items()}

    def means(self) -> dict[str, float]:
        """Return the metrics of `per_problem`, averaged over problems."""
        return {name: float(value.mean()) for name, value in self.per_problem().items()}

    def to_json(self) -> dict[str, Any]:
        """Return the evaluation as a JSON-serialisable dict."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        if self.rewards is None:
            del values["rewards"]
        return values

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Evaluation:
        """Build an evaluation from the dict that `to_json` returned; raises if it is no such dict."""
        evaluation = cls(**data)
        evaluation.means()  # raises for values of the wrong type or shape
        return evaluation


def load_evaluation(folder: Path, split: str, step: int) -> Evaluation:
    """Read an evaluation that a run has saved. Raises `CheckpointError` if it is damaged."""
    path = evaluation_path(folder, split, step)
    data = read_json(path)
    if not Checksums(folder).verify(path, path.read_bytes()):
        raise CheckpointError(f"{path} is damaged: its end is missing")
    with reading(path):
        return Evaluation.from_json(data)


def evaluation_path(folder: Path, split: str, step: int) -> Path:
    """Return the path of an evaluation in a run folder."""
    return folder / "evaluations" / f"{split}_{step:06d}.json"
