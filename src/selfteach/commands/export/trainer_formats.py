"""Writes critiqued rollouts as the data sets of other trainers.

What each of them reads:

* TRL 1.16: ``prompt`` (messages that end in the user's); ``privileged_context`` is SDPO's feedback
  (null: none) and SDFT's demonstration (never null); other columns are keyword arguments of reward
  functions, and ``solution`` is what TRL's read.
* ms-swift (OPSD under ``--rlhf_type gkd`` and ``grpo``): ``messages``; ``teacher_prompt`` replaces the
  last user message (never null: its batches are of rows that all have one, or none); ``solution`` is
  what its rewards read.
* verl: ``data_source``, ``prompt``, ``ability``, ``reward_model.ground_truth``, and ``extra_info``,
  which a reward function gets.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import pyarrow as pa
import pyarrow.parquet as pq

from selfteach.commands.export.exported_rollouts import ExportedRollout
from selfteach.errors import DataError
from selfteach.prompts.chat_messages import MessageRenderer
from selfteach.runtime.atomic_files import atomic_path
from selfteach.runtime.stored_records import history_rows
from selfteach.types import Critique, CritiqueFailure

Format = Literal["trl", "ms-swift", "verl"]
FORMATS: tuple[Format, ...] = get_args(Format)
SUFFIXES = (".parquet", ".jsonl")

TEXT, WHOLE, TRUTH = pa.string(), pa.int64(), pa.bool_()
MESSAGES = pa.list_(pa.struct([("role", TEXT), ("content", TEXT)]))
STEP = pa.struct([("text", TEXT), ("status", TEXT), ("original", TEXT)])
CRITIQUE = pa.struct(
    [("case", TEXT), ("answer", TEXT), ("first_error", WHOLE), ("steps", pa.list_(STEP))]
)
VERDICT = [
    ("problem_id", TEXT),
    ("sample", WHOLE),
    ("step", WHOLE),
    ("correct", TRUTH),
    ("parsed", TEXT),
    ("feedback", TEXT),
    ("finished", TRUTH),
    ("critique", CRITIQUE),
    ("critique_failure", TEXT),
]
"""Columns about a rollout that all formats have."""
SCHEMAS: Mapping[Format, pa.Schema] = {
    "trl": pa.schema(
        [
            ("prompt", MESSAGES),
            ("completion", MESSAGES),
            ("solution", TEXT),
            ("privileged_context", TEXT),
            ("teacher_prompt", MESSAGES),
            ("question", TEXT),
            ("history", MESSAGES),
            *VERDICT,
        ]
    ),
    "ms-swift": pa.schema(
        [
            ("messages", MESSAGES),
            ("teacher_prompt", TEXT),
            ("solution", TEXT),
            ("completion", TEXT),
            ("privileged_context", TEXT),
            *VERDICT,
        ]
    ),
    "verl": pa.schema(
        [
            ("data_source", TEXT),
            ("prompt", MESSAGES),
            ("ability", TEXT),
            ("reward_model", pa.struct([("style", TEXT), ("ground_truth", TEXT)])),
            (
                "extra_info",
                pa.struct(
                    [
                        ("split", TEXT),
                        ("index", WHOLE),
                        ("question", TEXT),
                        ("completion", TEXT),
                        ("privileged_context", TEXT),
                        *VERDICT,
                    ]
                ),
            ),
            ("privileged_context", TEXT),
            ("teacher_prompt", MESSAGES),
        ]
    ),
}


@dataclass
class DatasetCounts:
    """Counts what was written and what was left out."""

    rollouts: int = 0
    rows: int = 0
    problems: set[str] = field(default_factory=set)
    without_context: Counter[str] = field(default_factory=Counter)
    """Rollouts without a teacher context, by reason."""
    other_examples: int = 0
    """Rows of ms-swift whose teacher should see other earlier messages than the student."""


class RowWriter(Protocol):
    """Writes rows of one schema to a file."""

    def __call__(self, rows: list[dict[str, Any]]) -> None:
        """Append rows."""
        ...


def write_dataset(
    groups: Iterable[list[ExportedRollout]],
    file: Path,
    form: Format,
    renderer: MessageRenderer,
    *,
    data_source: str = "selfteach",
    with_all: bool = False,
) -> DatasetCounts:
    """Write rollouts to a new Parquet or JSON lines file; return counts.

    Rollouts without a context are left out unless ``with_all``; their ``privileged_context`` is null,
    and their ``teacher_prompt`` too, except for ms-swift, whose teacher is then shown the student's.
    Raises `DataError` if the file exists or has another suffix, or if no row is left.
    """
    require_new(file)
    counts = DatasetCounts()
    with _writer(file, SCHEMAS[form]) as write:
        for group in groups:
            chosen = [one for one in group if with_all or one.context is not None]
            counts.rollouts += len(group)
            counts.without_context.update(one.reason for one in group if one.reason is not None)
            rows = []
            for one in chosen:
                index = counts.rows + len(rows)
                row, same_examples = _row(one, form, renderer, data_source, index)
                rows.append(row)
                counts.other_examples += form == "ms-swift" and not same_examples
            counts.rows += len(rows)
            counts.problems |= {one.critiqued.rollout.problem.id for one in chosen}
            if rows:
                write(rows)
        if not counts.rows:
            raise DataError(f"nothing to export: {describe_left_out(counts) or 'no rollouts'}")
    return counts


def require_new(file: Path) -> None:
    """Raise `DataError` unless a data set can be written there."""
    if file.suffix not in SUFFIXES:
        raise DataError(f"--out {file}: the name must end in .parquet or .jsonl")
    if file.exists():
        raise DataError(f"--out {file} exists: name a new file, or delete it")


def describe_left_out(counts: DatasetCounts) -> str:
    """Return why rollouts have no context, in one line; empty if all have one."""
    reasons = counts.without_context.most_common()
    return ", ".join(f"{count:,} {reason}" for reason, count in reasons)


def _row(
    one: ExportedRollout, form: Format, renderer: MessageRenderer, data_source: str, index: int
) -> tuple[dict[str, Any], bool]:
    """Return a row, and whether student and teacher see the same messages before the last."""
    rollout, problem = one.critiqued.rollout, one.critiqued.rollout.problem
    student = renderer.solver(problem)
    teacher = None if one.context is None else renderer.teacher(problem, one.context)
    context = None if one.context is None else renderer.data(one.context)
    question, completion = renderer.data(problem.question), renderer.data(rollout.text)
    verdict = _verdict_columns(one)
    match form:
        case "trl":
            row = {
                "prompt": student,
                "completion": [{"role": "assistant", "content": completion}],
                "solution": problem.answer,
                "privileged_context": context,
                "teacher_prompt": teacher,
                "question": problem.question,
                "history": history_rows(problem),
                **verdict,
            }
        case "ms-swift":
            row = {
                "messages": student,
                "teacher_prompt": (teacher or student)[-1]["content"],
                "solution": problem.answer,
                "completion": completion,
                "privileged_context": context,
                **verdict,
            }
        case "verl":
            about = {"split": "train", "index": index, "question": question}
            row = {
                "data_source": data_source,
                "prompt": student,
                "ability": "reasoning",
                "reward_model": {"style": "rule", "ground_truth": problem.answer},
                "extra_info": {
                    **about, "completion": completion, "privileged_context": context, **verdict,
                },
                "privileged_context": context,
                "teacher_prompt": teacher,
            }  # fmt: skip
    return row, teacher is None or teacher[:-1] == student[:-1]


def _verdict_columns(one: ExportedRollout) -> dict[str, Any]:
    rollout, verdict, critique = (
        one.critiqued.rollout,
        one.critiqued.verdict,
        one.critiqued.critique,
    )
    columns: dict[str, Any] = {
        "problem_id": rollout.problem.id,
        "sample": rollout.sample,
        "step": one.step,
        "correct": verdict.correct,
        "parsed": verdict.parsed,
        "feedback": verdict.feedback,
        "finished": rollout.finished,
        "critique": None,
        "critique_failure": critique.reason if isinstance(critique, CritiqueFailure) else None,
    }
    if isinstance(critique, Critique):
        steps = [
            {"text": step.text, "status": step.status, "original": step.original}
            for step in critique.steps
        ]
        columns["critique"] = {
            "case": critique.case,
            "answer": critique.answer,
            "first_error": critique.first_error,
            "steps": steps,
        }
    return columns


@contextmanager
def _writer(file: Path, schema: pa.Schema) -> Iterator[RowWriter]:
    """Yield the function that appends rows; the file is there once all are written."""
    with atomic_path(file) as temporary:
        if file.suffix == ".jsonl":
            with temporary.open("w", encoding="utf-8") as lines:
                yield lambda rows: lines.writelines(json.dumps(row) + "\n" for row in rows)
            return
        with pq.ParquetWriter(temporary, schema, compression="zstd") as table:
            yield lambda rows: table.write_table(pa.Table.from_pylist(rows, schema))
