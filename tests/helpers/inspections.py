"""Write an inspection's folder by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from selfteach.commands.inspect.token_table import SCHEMA


def answer(
    problem: str,
    steps: Sequence[int],
    *,
    first_error: int | None,
    correct: bool,
    verbatim: dict[str, float | None] | None = None,
    contexts: dict[str, str] | None = None,
    located: bool = True,
    sample: int = 0,
) -> dict[str, Any]:
    """Return a line of answers.jsonl with the keys that analysis reads."""
    spans = [
        [steps.index(i), len(steps) - steps[::-1].index(i)] for i in sorted(set(steps)) if i >= 0
    ]
    return {
        "problem_id": problem,
        "sample": sample,
        "question": "?",
        "text": "…",
        "correct": correct,
        "parsed": "x",
        "step_spans": {"tokens": spans, "characters": spans},
        "first_error": first_error,
        "first_error_from": "oracle" if located else None,
        "contexts": contexts or {},
        "dropped": {},
        "verbatim": verbatim or {},
        "steps": list(steps),
    }


def write(
    folder: Path,
    contexts: Sequence[str],
    answers: Sequence[dict[str, Any]],
    advantages: dict[tuple[int, str], Sequence[float]],
    *,
    kinds: dict[int, Sequence[str]] | None = None,
    logp: dict[int, Sequence[float]] | None = None,
    entropy: dict[int, Sequence[float]] | None = None,
) -> Path:
    """Write a folder whose tokens have these advantages, by (line of answers.jsonl, context)."""
    rows = [
        {
            "answer": number, "problem_id": row["problem_id"], "sample": row["sample"],
            "context": context, "position": t, "token_id": t, "text": f"t{t}",
            "step": row["steps"][t], "region": _region(row["steps"][t], row),
            "correct": row["correct"], "advantage": a,
            "student_logp": logp[number][t] if logp else -1.0,
            "student_entropy": entropy[number][t] if entropy else 1.0,
            "teacher_logp": 0.0, "teacher_entropy": 0.0, "kl_forward": 0.0, "kl_reverse": 0.0,
            "kind": kinds[number][t] if kinds else "other", "policy_version": 0,
        }
        for number, row in enumerate(answers)
        for context in contexts
        for t, a in enumerate(advantages.get((number, context), ()))
    ]  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), folder / "tokens.parquet")
    (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))
    about = {"format": 1, "contexts": list(contexts)}
    (folder / "inspection.json").write_text(json.dumps(about))
    return folder


def _region(step: int, row: dict[str, Any]) -> str | None:
    error = row["first_error"]
    if step < 0 or row["first_error_from"] is None:
        return None
    if error is None:
        return "right" if row["correct"] else None
    return "failing" if step == error else "before" if step < error else "after"
