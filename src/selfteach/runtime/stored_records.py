"""Convert between the records of a run and the rows of its files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from datetime import date, time
from decimal import Decimal
from pathlib import Path
from typing import Any

from selfteach.config.migrations import migrate_rollout, migrate_usage
from selfteach.episodes import Segment
from selfteach.errors import CheckpointError
from selfteach.runtime.stored_files import reading
from selfteach.types import (
    Critique,
    CritiqueFailure,
    CritiqueStep,
    Problem,
    Rewards,
    Rollout,
    TrainingSample,
    Usage,
    Verdict,
)

EPISODE_FIELDS = frozenset({"segments", "observation", "verdict"})
"""Fields of a rollout that a single answer has no columns for."""
ANSWER_FIELDS = [f.name for f in fields(Rollout) if f.name not in {"problem", *EPISODE_FIELDS}]

SavedCritiques = dict[tuple[str, int], Critique | CritiqueFailure | None]
"""Critiques by `Rollout.key`."""


Decode = Callable[[Sequence[int]], str]
"""Makes text of token ids."""


def problem_digest(problem: Problem) -> str:
    """Return a hash of a problem's conversation and answer: which problem a rollout completes."""
    content = json.dumps([problem.question, problem.answer, *history_rows(problem)])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def history_rows(problem: Problem) -> list[dict[str, str]]:
    """Return the messages before a question as JSON objects with ``role`` and ``content``."""
    return [{"role": role, "content": content} for role, content in problem.history]


def history_column(problem: Problem) -> dict[str, Any]:
    """Return the column ``history`` of a row about a problem; no column for a question alone."""
    return {"history": history_rows(problem)} if problem.history else {}


def problems_fingerprint(problems: Sequence[Problem]) -> dict[str, Any]:
    """Return the number of problems, and a hash of their order and of all that they hold."""
    digest = hashlib.sha256()
    for p in problems:
        row = [p.id, p.question, p.answer, dict(p.references), dict(p.meta), *history_rows(p)]
        if p.columns:
            row.append(plain_columns(p.columns))
        digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
    return {"problems": len(problems), "sha256": digest.hexdigest()}


def plain_columns(columns: Mapping[str, Any]) -> Any:
    """Return a row's columns as JSON values; what has no form in JSON, like an image, by its type."""

    def plain(value: Any) -> str:
        return str(value) if isinstance(value, date | time | Decimal) else type(value).__name__

    return json.loads(json.dumps(dict(columns), default=plain))


def rollout_row(rollout: Rollout) -> dict[str, Any]:
    """Return a rollout as one JSON object; ``problem_sha256`` says which problem its id stood for."""
    values = {name: getattr(rollout, name) for name in ANSWER_FIELDS}
    problem = rollout.problem
    return {
        "problem_id": problem.id,
        "problem_sha256": problem_digest(problem),
        **values,
        **episode_columns(rollout),
    }


def episode_columns(rollout: Rollout) -> dict[str, Any]:
    """Return the columns of an episode; none for a single answer, whose rows stay as they were."""
    if not rollout.is_episode:
        return {}
    verdict = None if rollout.verdict is None else asdict(rollout.verdict)
    segments = [asdict(segment) for segment in rollout.segments]
    return {"segments": segments, "observation": rollout.observation, "verdict": verdict}


def episode_fields(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a `Rollout` that `episode_columns` has written; none for a single answer."""
    if "segments" not in row:
        return {}
    return {
        "segments": tuple(Segment(**segment) for segment in row["segments"]),
        "observation": row.get("observation", ""),
        "verdict": _verdict_from(row.get("verdict")),
    }


def _verdict_from(row: Mapping[str, Any] | None) -> Verdict | None:
    """Return an environment's verdict, with its rewards if it has given some."""
    if row is None:
        return None
    rewards = row["rewards"]
    if rewards is not None:
        rewards = Rewards(rewards["total"], rewards["values"], rewards["failures"])
    return Verdict(**{**row, "rewards": rewards})


def rollouts_from(
    rows: Iterable[Mapping[str, Any]], problems: Mapping[str, Problem], path: Path
) -> list[Rollout]:
    """Return the rollouts of rows; problems by id.

    Raises `CheckpointError` if a row is damaged, or of a problem that is not among these, or that has
    another question or answer now.
    """
    rollouts = []
    for row in map(migrate_rollout, rows):
        with reading(path):
            id_, digest = row.pop("problem_id"), row.pop("problem_sha256", None)
            for field in ("prompt_ids", "token_ids", "logps"):
                row[field] = tuple(row[field])
            if not (isinstance(row["text"], str) and isinstance(row["sample"], int)):
                raise TypeError("text is no string, or sample no number")
            row |= episode_fields(row)
        problem = problems.get(id_)
        if problem is None or digest not in (None, problem_digest(problem)):
            what = "not among the problems" if problem is None else "another problem now"
            raise CheckpointError(
                f"{path}: problem {id_!r} is {what}: the data has changed since these rollouts were "
                "sampled; restore it, or start a new run in another folder"
            )
        with reading(path):
            rollouts.append(Rollout(problem=problem, **row))
    return rollouts


def sample_row(sample: TrainingSample, prompt: str | None = None) -> dict[str, Any]:
    """Return a sample as one JSON object; joins the rollouts by problem_id and sample.

    ``prompt`` is the student's prompt as text, control tokens included; no column without it.
    """
    rollout, critique = sample.rollout, sample.critiqued.critique
    return {
        "problem_id": rollout.problem.id,
        "sample": rollout.sample,
        **history_column(rollout.problem),
        "question": rollout.problem.question,
        **({} if prompt is None else {"prompt": prompt}),
        "answer": rollout.text,
        "finished": rollout.finished,
        **verdict_row(sample.critiqued.verdict),
        "critique": None if critique is None else asdict(critique),
        "context": sample.context,
        "dropped": sample.dropped,
        "steps": sample.steps,
        **segment_columns(rollout),
        "gold": rollout.problem.answer,
        "first_error_token": sample.first_error_token,
        "first_change": None if sample.change is None else asdict(sample.change),
    }


def segment_columns(rollout: Rollout) -> dict[str, Any]:
    """Return an episode's segments as ranges of characters of its text, and whether its environment has
    judged it; no column for an answer."""
    if not rollout.is_episode:
        return {}
    rows = zip(rollout.segments, rollout.text_spans, strict=True)
    segments = [{"kind": s.kind, "event": s.event, "span": span} for s, span in rows]
    return {"segments": segments, **({"judged": True} if rollout.verdict is not None else {})}


def verdict_row(verdict: Verdict) -> dict[str, Any]:
    """Return a verdict as columns of a row; rewards as their total, ``reward``, and by name."""
    row = asdict(verdict)
    del row["rewards"]
    if (rewards := verdict.rewards) is None:
        return row
    failures = {"reward_failures": dict(rewards.failures)} if rewards.failures else {}
    return {**row, "reward": rewards.total, "rewards": dict(rewards.values), **failures}


def sample_rows(
    samples: Iterable[TrainingSample], decode: Decode | None
) -> Iterator[dict[str, Any]]:
    """Yield the rows of samples, the student's prompt in the first row of each prompt.

    Without ``decode`` no row has a prompt.
    """
    decoded = set[tuple[int, ...]]()
    for sample in samples:
        ids = sample.rollout.prompt_ids
        is_first = decode is not None and ids not in decoded
        decoded.add(ids)
        yield sample_row(sample, decode(ids) if decode is not None and is_first else None)


def critiques_by_key(rows: Iterable[Mapping[str, Any]], path: Path) -> SavedCritiques:
    """Return the critiques of rows. Raises `CheckpointError` if a row is damaged."""
    with reading(path):
        return {(row["problem_id"], row["sample"]): critique_from(row["critique"]) for row in rows}


def critique_from(row: dict[str, Any] | None) -> Critique | CritiqueFailure | None:
    """Return a critique, or the reason for none, from a row of ``critiques/`` or ``samples/``."""
    if row is None:
        return None
    usage = Usage(**migrate_usage(row.get("usage", {})))
    if "reason" in row:
        reply = row.get("reply", row.get("said", ""))  # "said" in folders of earlier versions
        return CritiqueFailure(
            row["reason"], row.get("detail", ""), usage, reply, row.get("answer")
        )
    return Critique(
        case=row["case"],
        steps=tuple(CritiqueStep(**step) for step in row["steps"]),
        answer=row["answer"],
        first_error=row["first_error"],
        usage=usage,
    )
