"""An inspection as a folder: answers.jsonl, tokens.parquet, inspection.json, each of them whole."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from selfteach.commands.inspect.answer_rows import Inspected, answer_row
from selfteach.commands.inspect.token_table import SCHEMA, rows
from selfteach.config.recipe import CONTEXTS, PARTLY_ALIGNED, ContextName
from selfteach.config.schema import nearest
from selfteach.errors import DataError, RecipeError
from selfteach.evaluation.token_scores import Limits, ScoreFn, score_rollouts
from selfteach.runtime.run_folder import require_empty, write_json, write_lines, written_whole
from selfteach.trainer.build import Built
from selfteach.trainer.step import verify_and_critique
from selfteach.types import CritiquedRollout, Problem, Sampling

FORMAT = 1
WINDOW = 512
"""Answers whose scores are held before they are written."""

Progress = Callable[[int, int], None]
"""Called with the number of answers that are scored, and of all."""


@dataclass(frozen=True, slots=True)
class Scorers:
    """Who scores: the same model without and with a context, or a trained one and its initial self."""

    student: ScoreFn
    teacher: ScoreFn


def check_contexts(names: Sequence[str]) -> tuple[str, ...]:
    """Contexts by name, each once, in their usual order; of the dial by position.

    Raises `RecipeError` for a name that is none.
    """
    known: list[ContextName] = [name for name in CONTEXTS if name != "none"]
    for name in names:
        if name == "none":
            raise RecipeError('context "none" shows nothing: the advantage would be 0')
        if position(name) is None and name not in known:
            raise RecipeError(f"no context {name!r}; {nearest(name, known)}")
    if not names:
        raise RecipeError(f"name at least one context; known: {', '.join(known)}")
    dial = sorted(
        (name for name in set(names) if "@" in name), key=lambda name: position(name) or 0.0
    )
    return (*(name for name in known if name in names), *dial)


def position(name: str) -> float | None:
    """Where on the dial a context like ``partly_aligned@0.6`` is; None for any other name.

    Raises `RecipeError` for a position that is no number from 0 to 1.
    """
    kind, at, place = name.partition("@")
    if kind != PARTLY_ALIGNED or not at:
        return None
    try:
        value = float(place)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise RecipeError(f"context {name!r}: a position of the dial is a number from 0 to 1")
    return value


def sample_and_mark(
    built: Built, problems: Sequence[Problem], sampling: Sampling
) -> list[CritiquedRollout]:
    """Sample rollouts of the problems, verify and critique them."""
    rollouts = built.components.engine.generate(problems, sampling)
    return verify_and_critique(built.components, rollouts)


def write_inspection(
    built: Built,
    answers: Sequence[Inspected],
    scorers: Scorers,
    folder: Path,
    about: Mapping[str, Any],
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Score all answers under their contexts and write the folder; returns inspection.json.

    inspection.json is written last: with it the folder is complete. Raises `CheckpointError` if the
    folder holds anything, `DataError` if there is nothing to score.
    """
    require_empty(folder)
    if not any(answer.teacher_prompts for answer in answers):
        raise DataError(_nothing(answers))
    started = time.monotonic()
    tokens = _write_tokens(built, answers, scorers, folder / "tokens.parquet", progress)
    write_lines(folder / "answers.jsonl", map(answer_row, answers))
    summary = {
        "format": FORMAT,
        **about,
        "temperature": 1.0,
        "answers": len(answers),
        "right": sum(answer.told.critiqued.verdict.correct for answer in answers),
        "first_errors": sum(answer.told.first_error is not None for answer in answers),
        "rows": tokens,
        "scored": dict(Counter(name for a in answers for name in a.teacher_prompts)),
        "dropped": _dropped(answers),
        "seconds_scoring": time.monotonic() - started,
    }
    write_json(folder / "inspection.json", summary)
    return summary


def _write_tokens(
    built: Built,
    answers: Sequence[Inspected],
    scorers: Scorers,
    path: Path,
    progress: Progress | None,
) -> int:
    """tokens.parquet, a row group per window of answers; the number of its rows."""
    components, written = built.components, 0
    limits = Limits(components.micro_batch_tokens, components.chunk_tokens)
    with (
        written_whole(path) as aside,
        pq.ParquetWriter(aside, SCHEMA, compression="zstd") as writer,
    ):
        for start in range(0, len(answers), WINDOW):
            window = answers[start : start + WINDOW]
            told = score_rollouts(
                scorers.student, scorers.teacher, [answer.asked for answer in window],
                pad_id=components.pad_id, device=components.policy.device, limits=limits,
            )  # fmt: skip
            table = rows(components.renderer, start, list(zip(window, told, strict=True)))
            writer.write_table(table)
            written += table.num_rows
            if progress is not None:
                progress(start + len(window), len(answers))
    return written


def _dropped(answers: Sequence[Inspected]) -> dict[str, dict[str, int]]:
    """How often each context could not be shown, by reason."""
    counted: dict[str, Counter[str]] = {}
    for answer in answers:
        for name, reason in answer.dropped.items():
            counted.setdefault(name, Counter())[reason] += 1
    return {name: dict(reasons) for name, reasons in counted.items()}


def _nothing(answers: Sequence[Inspected]) -> str:
    reasons = _dropped(answers)
    told = "; ".join(f"{name}: {max(r, key=lambda k: r[k])}" for name, r in reasons.items())
    return f"no answer can be scored under any of these contexts ({told or 'there is no answer'})"
