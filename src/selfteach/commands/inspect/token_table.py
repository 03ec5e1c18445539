"""Define ``tokens.parquet``: one row per rollout × context × token, each column with a description."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from selfteach.commands.inspect.answer_rows import PreparedRollout
from selfteach.evaluation.token_scores import TokenScores
from selfteach.prompts.renderer import Renderer

FORMAT = "1"


def _field(name: str, kind: Any, meaning: str, unit: str = "", *, nullable: bool = False) -> Any:
    metadata = {"description": meaning, **({"unit": unit} if unit else {})}
    return pa.field(name, kind, nullable=nullable, metadata=metadata)


_TEXT, _INT, _REAL = pa.string(), pa.int32(), pa.float32()

SCHEMA = pa.schema(
    [
        _field("answer", _INT, "line of answers.jsonl, from 0"),
        _field("problem_id", _TEXT, "id of the problem"),
        _field("sample", _INT, "index of the rollout among those of its problem, from 0"),
        _field("context", _TEXT, "name of the context that the teacher was shown"),
        _field("position", _INT, "index of the token in the rollout, from 0", "tokens"),
        _field("token_id", _INT, "id in the model's vocabulary; of a sampled rollout, as sampled"),
        _field("text", _TEXT, "the token as text, special tokens by name"),
        _field("step", _INT, "index of the solution step, from 0; -1 outside all steps"),
        _field("region", _TEXT, "before, failing or after the first error; right: in a correct "
               "rollout without a wrong step; null: first error unknown, or outside all steps",
               nullable=True),
        _field("correct", pa.bool_(), "whether the final answer is correct"),
        _field("student_logp", _REAL, "log p(token | question)", "nats"),
        _field("teacher_logp", _REAL, "log p(token | question, context)", "nats"),
        _field("advantage", _REAL, "teacher_logp - student_logp", "nats"),
        _field("kl_forward", _REAL, "KL(teacher || student), full vocabulary", "nats"),
        _field("kl_reverse", _REAL, "KL(student || teacher), full vocabulary", "nats"),
        _field("student_entropy", _REAL, "entropy of the student's next token", "nats"),
        _field("teacher_entropy", _REAL, "entropy of the teacher's next token", "nats"),
        _field("kind", _TEXT, "style, task or other, by the word that the token belongs to"),
        _field("policy_version", _INT, "number of updates of the weights that sampled the rollout"),
    ],
    metadata={"selfteach.format": FORMAT, "temperature": "1"},
)  # fmt: skip


def rows(
    renderer: Renderer,
    first: int,
    scored: Sequence[tuple[PreparedRollout, Mapping[str, TokenScores]]],
) -> pa.Table:
    """Return the rows of some rollouts, the first of which is line ``first`` of answers.jsonl.

    In order of rollout, context (as requested) and position.
    """
    tables = [
        _rows_of(renderer, first + i, prepared, context, scores[context])
        for i, (prepared, scores) in enumerate(scored)
        for context in prepared.contexts
        if context in scores
    ]
    return pa.concat_tables(tables) if tables else SCHEMA.empty_table()


def _rows_of(
    renderer: Renderer, line: int, prepared: PreparedRollout, context: str, scores: TokenScores
) -> pa.Table:
    critiqued = prepared.located.critiqued
    rollout, verdict = critiqued.rollout, critiqued.verdict
    positions = list(rollout.model_positions)
    ids = [rollout.token_ids[i] for i in positions]
    columns: dict[str, Any] = {
        "position": np.array(positions, dtype=np.int32),
        "token_id": ids,
        "text": [renderer.token_text(token) for token in ids],
        "step": prepared.steps(),
        "region": prepared.regions(),
        "kind": prepared.kinds,
        **scores,
    }
    constant = {
        "answer": line,
        "problem_id": rollout.problem.id,
        "sample": rollout.sample,
        "context": context,
        "correct": verdict.correct,
        "policy_version": rollout.policy_version,
    }
    arrays = [
        pa.array(columns[field.name], field.type)
        if field.name in columns
        else pa.repeat(pa.scalar(constant[field.name], field.type), len(ids))
        for field in SCHEMA
    ]
    return pa.Table.from_arrays(arrays, schema=SCHEMA)
