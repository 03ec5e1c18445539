"""Score rollouts and write an inspection: answers.jsonl, tokens.parquet and inspection.json."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from selfteach.commands.inspect.answer_rows import PreparedRollout, answer_row
from selfteach.commands.inspect.token_table import SCHEMA, rows
from selfteach.config.part_names import is_custom
from selfteach.config.recipe import CONTEXTS, PARTLY_ALIGNED, ContextName
from selfteach.config.schema import nearest
from selfteach.errors import DataError, RecipeError
from selfteach.evaluation.token_scores import ScoreFn, ScoringLimits, score_rollouts
from selfteach.runtime.atomic_files import atomic_path, write_json, write_lines
from selfteach.runtime.folder_start import require_empty
from selfteach.trainer.build import Built
from selfteach.trainer.step import verify_and_critique
from selfteach.types import CritiquedRollout, Problem, Sampling

FORMAT = 1
WINDOW = 512
"""Rollouts whose scores are held in memory before they are written."""

ScoringProgress = Callable[[int, int], None]
"""Called with the number of rollouts that are scored, and of all."""


@dataclass(frozen=True, slots=True)
class Scorers:
    """Holds the scoring functions of student and teacher, which may be the same model."""

    student: ScoreFn
    teacher: ScoreFn


def check_contexts(names: Sequence[str], labels: Container[str] = ()) -> tuple[str, ...]:
    """Return contexts by name, each once, in their usual order; those of the dial by position, last
    contexts of one's own: names that can be imported, or in ``labels``.

    Raises `RecipeError` for an unknown name.
    """
    custom_names = dict.fromkeys(n for n in names if n in labels or is_custom("context", n))
    names = [name for name in names if name not in custom_names]
    all_names: list[ContextName] = [name for name in CONTEXTS if name != "none"]
    for name in names:
        if name == "none":
            raise RecipeError('context "none" shows nothing: the advantage would be 0')
        if position(name) is None and name not in all_names:
            raise RecipeError(f"no context {name!r}; {nearest(name, all_names)}")
    if not names and not custom_names:
        raise RecipeError(f"name at least one context; known: {', '.join(all_names)}")
    dial = sorted(
        (name for name in set(names) if "@" in name), key=lambda name: position(name) or 0.0
    )
    return (*(name for name in all_names if name in names), *dial, *custom_names)


def position(name: str) -> float | None:
    """Return the dial position in a name like ``partly_aligned@0.6``; None for any other name.

    Raises `RecipeError` for a position that is not a number from 0 to 1.
    """
    kind, at, place = name.partition("@")
    if kind != PARTLY_ALIGNED or not at:
        return None
    try:
        value = float(place)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise RecipeError(f"context {name!r}: the alignment after @ is a number from 0 to 1")
    return value


def sample_and_critique(
    built: Built, problems: Sequence[Problem], sampling: Sampling
) -> list[CritiquedRollout]:
    """Sample rollouts of the problems, verify and critique them."""
    rollouts = built.components.engine.generate(problems, sampling)
    return verify_and_critique(built.components, rollouts)


def write_inspection(
    built: Built,
    rollouts: Sequence[PreparedRollout],
    scorers: Scorers,
    folder: Path,
    about: Mapping[str, Any],
    progress: ScoringProgress | None = None,
) -> dict[str, Any]:
    """Score all rollouts under their contexts, write the folder and return what inspection.json holds.

    inspection.json is written last: with it the folder is complete. Raises `CheckpointError` if the
    folder is not empty, `DataError` if there is nothing to score.
    """
    require_empty(folder)
    if not any(rollout.teacher_prompts for rollout in rollouts):
        raise DataError(_nothing_to_score(rollouts))
    started = time.monotonic()
    tokens = _write_tokens(built, rollouts, scorers, folder / "tokens.parquet", progress)
    write_lines(folder / "answers.jsonl", map(answer_row, rollouts))
    summary = {
        "format": FORMAT,
        **about,
        "temperature": 1.0,
        "answers": len(rollouts),
        "right": sum(rollout.located.critiqued.verdict.correct for rollout in rollouts),
        "first_errors": sum(rollout.located.first_error is not None for rollout in rollouts),
        "rows": tokens,
        "scored": dict(Counter(name for r in rollouts for name in r.teacher_prompts)),
        "dropped": _dropped(rollouts),
        "seconds_scoring": time.monotonic() - started,
    }
    write_json(folder / "inspection.json", summary)
    return summary


def _write_tokens(
    built: Built,
    rollouts: Sequence[PreparedRollout],
    scorers: Scorers,
    path: Path,
    progress: ScoringProgress | None,
) -> int:
    """Write tokens.parquet, a row group per window of rollouts; return its number of rows."""
    components, written = built.components, 0
    limits = ScoringLimits(components.micro_batch_tokens, components.chunk_tokens)
    with (
        atomic_path(path) as temporary,
        pq.ParquetWriter(temporary, SCHEMA, compression="zstd") as writer,
    ):
        for start in range(0, len(rollouts), WINDOW):
            window = rollouts[start : start + WINDOW]
            scores = score_rollouts(
                scorers.student, scorers.teacher, [rollout.score_request for rollout in window],
                pad_id=components.pad_id, device=components.policy.device, limits=limits,
            )  # fmt: skip
            table = rows(components.renderer, start, list(zip(window, scores, strict=True)))
            writer.write_table(table)
            written += table.num_rows
            if progress is not None:
                progress(start + len(window), len(rollouts))
    return written


def _dropped(rollouts: Sequence[PreparedRollout]) -> dict[str, dict[str, int]]:
    """Count how often each context could not be shown, by reason."""
    counts: dict[str, Counter[str]] = {}
    for rollout in rollouts:
        for name, reason in rollout.dropped.items():
            counts.setdefault(name, Counter())[reason] += 1
    return {name: dict(reasons) for name, reasons in counts.items()}


def _nothing_to_score(rollouts: Sequence[PreparedRollout]) -> str:
    """Return the error line, with the most frequent reason per context."""
    dropped = _dropped(rollouts)
    reasons = "; ".join(f"{name}: {max(r, key=lambda k: r[k])}" for name, r in dropped.items())
    return (
        f"no rollout can be scored under any of these contexts ({reasons or 'there is no rollout'})"
    )
