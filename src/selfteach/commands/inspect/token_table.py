"""``tokens.parquet``: one row per answer × context × token. The schema carries its own description."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from selfteach.commands.inspect.answer_rows import Inspected
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
        _field("problem_id", _TEXT, "which problem; with sample: which answer"),
        _field("sample", _INT, "which of the answers to the problem, from 0"),
        _field("context", _TEXT, "what the self-teacher was shown"),
        _field("position", _INT, "index of the token in the answer, from 0", "tokens"),
        _field("token_id", _INT, "id in the model's vocabulary; of a sampled answer, as sampled"),
        _field("text", _TEXT, "the token as text, special tokens by name"),
        _field("step", _INT, "index of the step, from 0; -1 outside all steps"),
        _field("region", _TEXT, "before, failing or after the first error; right: in an answer "
               "that is right and has no wrong step; null: nobody says, or outside all steps",
               nullable=True),
        _field("correct", pa.bool_(), "whether the final answer is right"),
        _field("student_logp", _REAL, "log p(token | question)", "nats"),
        _field("teacher_logp", _REAL, "log p(token | question, context)", "nats"),
        _field("advantage", _REAL, "teacher_logp - student_logp", "nats"),
        _field("kl_forward", _REAL, "KL(teacher || student), full vocabulary", "nats"),
        _field("kl_reverse", _REAL, "KL(student || teacher), full vocabulary", "nats"),
        _field("student_entropy", _REAL, "entropy of the student's next token", "nats"),
        _field("teacher_entropy", _REAL, "entropy of the teacher's next token", "nats"),
        _field("kind", _TEXT, "style, task or other, by the word that the token belongs to"),
        _field("policy_version", _INT, "weight updates behind the weights that sampled the answer"),
    ],
    metadata={"selfteach.format": FORMAT, "temperature": "1"},
)  # fmt: skip


def rows(
    renderer: Renderer, first: int, scored: Sequence[tuple[Inspected, Mapping[str, TokenScores]]]
) -> pa.Table:
    """The rows of some answers, the first of which is line ``first`` of answers.jsonl.

    In order of answer, context (as asked) and position.
    """
    parts = [
        _rows_of(renderer, first + i, inspected, context, told[context])
        for i, (inspected, told) in enumerate(scored)
        for context in inspected.contexts
        if context in told
    ]
    return pa.concat_tables(parts) if parts else SCHEMA.empty_table()


def _rows_of(
    renderer: Renderer, answer: int, inspected: Inspected, context: str, scores: TokenScores
) -> pa.Table:
    rollout, verdict = inspected.told.critiqued.rollout, inspected.told.critiqued.verdict
    ids = rollout.token_ids
    columns: dict[str, Any] = {
        "position": np.arange(len(ids), dtype=np.int32),
        "token_id": ids,
        "text": [renderer.token_text(token) for token in ids],
        "step": inspected.steps(),
        "region": inspected.regions(),
        "kind": inspected.kinds,
        **scores,
    }
    same = {
        "answer": answer,
        "problem_id": rollout.problem.id,
        "sample": rollout.sample,
        "context": context,
        "correct": verdict.correct,
        "policy_version": rollout.policy_version,
    }
    arrays = [
        pa.array(columns[field.name], field.type)
        if field.name in columns
        else pa.repeat(pa.scalar(same[field.name], field.type), len(ids))
        for field in SCHEMA
    ]
    return pa.Table.from_arrays(arrays, schema=SCHEMA)
