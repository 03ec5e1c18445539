"""Reads problems and completions as trainers hand them to reward functions: columns and messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from selfteach.config.data_section import Columns
from selfteach.errors import DataError
from selfteach.prompts.thinking import split_thinking
from selfteach.tasks.sources.columns import problem_from
from selfteach.tasks.sources.conversations import is_conversation
from selfteach.tasks.sources.source_row import MissingValue, Row
from selfteach.types import Problem

EMPTY_ANSWER = "the answer is empty"
"""What `problem_from` says of a row whose answer is null or empty."""


def problem_of(values: Mapping[str, Any], number: int, columns: Columns) -> Problem | None:
    """Return the problem of a row of a batch; None if its answer is null: nothing to compare with.

    The columns are recognised as in problem sets: ``prompt`` or ``question``, ``answer``, ``solution``
    or ``ground_truth``, and ``history``, ``reference``, ``meta``, ``problem_id`` where they are.
    Raises `DataError` in one line if there is none of them, or if it cannot be read.
    """
    if "problem_id" in values and columns.id is None:
        columns = columns.model_copy(update={"id": "problem_id"})
    try:
        return problem_from(Row(dict(values), f"row {number}", f"row-{number}"), columns)
    except MissingValue as missing:
        if str(missing) == EMPTY_ANSWER:
            return None
        hint = str(missing)
        for name in ("question", "answer"):
            hint = hint.replace(f'data.columns.{name} = "…"', f'{name}="…"')
        raise DataError(f"row {number} of the batch: {hint}") from None


def text_of(completion: Any) -> str:
    """Return a completion's text without its thought: a text, or the last of a list of messages."""
    if is_conversation(completion):
        content = completion[-1].get("content")
        if isinstance(content, list):
            parts = [part.get("text", "") for part in content if isinstance(part, Mapping)]
            content = "".join(parts)
        completion = content or ""
    if not isinstance(completion, str):
        raise DataError(f"a completion is a {type(completion).__name__}, not a text or messages")
    return split_thinking(completion)[1]


def rows_of(prompts: Sequence[Any], columns: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of a batch from its columns; what is no column of this length is left out.

    TRL also passes ``trainer_state``, ``log_extra`` and the like.
    """
    fitting = {
        name: values
        for name, values in columns.items()
        if isinstance(values, Sequence)
        and not isinstance(values, str)
        and len(values) == len(prompts)
    }
    return [
        {"prompt": prompt, **{name: values[index] for name, values in fitting.items()}}
        for index, prompt in enumerate(prompts)
    ]
