"""Read an inspection's folder: answers.jsonl and tokens.parquet as arrays.

Axis letters: N rows of tokens.parquet, A answers, C contexts, P problems.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from selfteach.errors import CheckpointError
from selfteach.runtime.stored_files import read_bytes, read_json, read_lines, reading

REGIONS = ("before", "failing", "after", "right")
KINDS = ("style", "task", "other")
FORMAT = 1
"""The format of inspection.json that can be read."""

_NUMBERS = ("answer", "position", "step", "advantage", "student_logp", "student_entropy")


@dataclass(frozen=True, slots=True)
class Inspection:
    """Holds all answers and all their tokens under all contexts.

    Rows of one answer under one context are contiguous, in order of position.
    """

    about: Mapping[str, Any]
    """inspection.json."""
    answers: Sequence[Mapping[str, Any]]
    """answers.jsonl, line by line."""
    contexts: tuple[str, ...]
    problem_A: np.ndarray
    """Index of each answer's problem, from 0."""
    answer_N: np.ndarray
    context_N: np.ndarray
    """Index into ``contexts``."""
    position_N: np.ndarray
    step_N: np.ndarray
    """−1 outside all steps."""
    region_N: np.ndarray
    """Index into `REGIONS`; −1 where the first error is unknown."""
    kind_N: np.ndarray
    """Index into `KINDS`."""
    advantage_N: np.ndarray
    student_logp_N: np.ndarray
    student_entropy_N: np.ndarray

    @property
    def num_problems(self) -> int:
        """Return how many problems there are."""
        return int(self.problem_A.max()) + 1

    @property
    def first_error_A(self) -> np.ndarray:
        """Return the index of each answer's first wrong step; −1 where none is known, [A]."""
        first = (row["first_error"] for row in self.answers)
        return np.array([-1 if f is None else f for f in first])

    @property
    def sound_A(self) -> np.ndarray:
        """Return which answers are right and checked to have no wrong step, [A]."""
        return np.array(
            [
                row["correct"]
                and row["first_error"] is None
                and row["first_error_from"] is not None
                for row in self.answers
            ]
        )


def read_inspection(folder: Path) -> Inspection:
    """Read an inspection's folder. Raises `CheckpointError` if it is missing, unfinished or unknown."""
    with reading(folder):
        return _read_inspection(folder)


def _read_inspection(folder: Path) -> Inspection:
    about = _about(folder)
    answers = _answers(folder)
    table = pq.read_table(
        folder / "tokens.parquet", columns=[*_NUMBERS, "context", "region", "kind"]
    )
    numbers = {f"{name}_N": table.column(name).to_numpy() for name in _NUMBERS}
    contexts = tuple(about["contexts"])
    return Inspection(
        about=about,
        answers=answers,
        contexts=contexts,
        problem_A=_codes_of([row["problem_id"] for row in answers]),
        context_N=_codes(table.column("context"), contexts),
        region_N=_codes(table.column("region"), REGIONS),
        kind_N=_codes(table.column("kind"), KINDS),
        **numbers,
    )


def example(
    folder: Path, *, answer: int | None = None, contexts: Sequence[str] | None = None
) -> dict[str, Any] | None:
    """Return one answer under several contexts, for `results_figures.token_advantages`.

    By default the first wrong answer whose first error has steps before and after it; None if there
    is none.
    """
    about = _about(folder)
    rows = _answers(folder)
    if answer is None:
        answer = next((i for i, row in enumerate(rows) if _is_instructive(row)), None)
    if answer is None:
        return None
    tokens = pq.read_table(folder / "tokens.parquet", filters=[("answer", "=", answer)])
    scored = {name: tokens.filter(pc.field("context") == name).to_pydict()
              for name in contexts or about["contexts"]}  # fmt: skip
    scored = {name: columns for name, columns in scored.items() if columns["position"]}
    if not scored:
        return None
    row, first = rows[answer], next(iter(scored.values()))
    spans, error = row["step_spans"]["tokens"], row["first_error"]
    return {
        "problem": row["problem_id"],
        "question": row["question"],
        "answer": row["text"],
        "correct": row["correct"],
        "first_error_token": None if error is None else spans[error][0],
        "tokens": first["text"],
        "steps": first["step"],
        "contexts": {
            name: {"text": row["contexts"][name], "advantage": columns["advantage"]}
            for name, columns in scored.items()
        },
    }


def _answers(folder: Path) -> list[dict[str, Any]]:
    path = folder / "answers.jsonl"
    return read_lines(read_bytes(path) or b"", path)[0]


def _is_instructive(row: Mapping[str, Any]) -> bool:
    error, last = row["first_error"], len(row["step_spans"]["tokens"]) - 1
    return not row["correct"] and error is not None and 0 < error < last - 1 and not row["dropped"]


def _about(folder: Path) -> dict[str, Any]:
    path = folder / "inspection.json"
    if not path.exists():
        raise CheckpointError(f"{folder} holds no finished inspection: no {path.name}")
    about = read_json(path)
    if about.get("format") != FORMAT:
        raise CheckpointError(f"{path}: format {about.get('format')!r}, expected {FORMAT}")
    return about


def _codes(column: pa.ChunkedArray, names: Sequence[str]) -> np.ndarray:
    """Return the index of each value in ``names``; −1 for null."""
    options = pc.SetLookupOptions(pa.array(names))
    indices = pc.call_function("index_in", [column], options)
    return indices.fill_null(-1).to_numpy().astype(np.int64)


def _codes_of(values: Sequence[str]) -> np.ndarray:
    """Return the index of each value among the distinct ones, in order of appearance."""
    codes: dict[str, int] = {}
    return np.array([codes.setdefault(value, len(codes)) for value in values])
