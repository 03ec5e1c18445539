"""Builds the arguments with which TRL calls a reward function (1.16, `GRPOTrainer._calculate_rewards`).

prompts         texts, or lists of messages where the problem is a conversation
completions     texts, or lists of the assistant's one message; of an episode, of turns and replies
completion_ids  the token ids after the prompt, with the end token if the policy produced it
columns         one list per column of the rows, besides ``prompt`` and ``completion``
trainer_state   the progress of training, a `transformers.TrainerState`
log_extra       function of a column's name and a value per completion
log_metric      function of a metric's name and a number
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from selfteach.episodes import LIMITS
from selfteach.tasks.sources.conversations import is_conversation
from selfteach.types import Problem, Rollout

NOT_COLUMNS = ("prompt", "completion", "completion_ids")
"""Columns that TRL does not pass by their names."""
Prompt = str | list[dict[str, str]]


def reward_arguments(
    rollouts: Sequence[Rollout], completion: Callable[[Sequence[int]], str], trainer_state: Any
) -> dict[str, Any]:
    """Return the keyword arguments besides the two functions that log."""
    prompts = [_prompt(rollout) for rollout in rollouts]
    return {
        **columns_of([rollout.problem for rollout in rollouts]),
        "prompts": prompts,
        "completions": [
            _messages(rollout, completion)
            if not isinstance(prompt, str)
            else completion(rollout.token_ids)
            for prompt, rollout in zip(prompts, rollouts, strict=True)
        ],
        "completion_ids": [list(rollout.token_ids) for rollout in rollouts],
        "trainer_state": trainer_state,
    }


def _prompt(rollout: Rollout) -> Prompt:
    """Return a rollout's prompt; an episode's is a list of messages, as its completion is."""
    prompt = prompt_of(rollout.problem)
    if not rollout.is_episode or not isinstance(prompt, str):
        return prompt
    return [{"role": "user", "content": prompt}]


def _messages(rollout: Rollout, completion: Callable[[Sequence[int]], str]) -> list[dict[str, str]]:
    """Return what follows the prompt as messages: turns of the assistant, and replies to them."""
    if not rollout.is_episode:
        return [{"role": "assistant", "content": completion(rollout.token_ids)}]
    messages = []
    for segment in rollout.segments:
        if segment.kind == "model":
            text = completion(rollout.token_ids[segment.start : segment.stop])
            messages.append({"role": "assistant", "content": text})
        elif segment.event not in LIMITS:
            role = "user" if segment.event == "observation" else "tool"
            messages.append({"role": role, "content": segment.text})
    return messages


def prompt_of(problem: Problem) -> Prompt:
    """Return a problem's prompt as its data set has it: a text, or a list of messages."""
    raw = problem.columns.get("prompt")
    if is_conversation(raw):
        return [dict(message) for message in raw]  # type: ignore[union-attr]
    question = raw if isinstance(raw, str) else problem.question
    if not problem.history:
        return question
    turns = (*problem.history, ("user", question))
    return [{"role": role, "content": content} for role, content in turns]


def columns_of(problems: Sequence[Problem]) -> dict[str, list[Any]]:
    """Return the columns of the problems' rows, one list each; None where a row lacks a column.

    ``answer`` is always among them: the gold answer, unless the rows have a column of that name.
    Problems that come from no row have ``id``, ``answer``, their worked solutions and their ``meta``.
    """
    rows = [_row(problem) for problem in problems]
    names = dict.fromkeys(name for row in rows for name in row if name not in NOT_COLUMNS)
    return {name: [row.get(name) for row in rows] for name in names}


def _row(problem: Problem) -> Mapping[str, Any]:
    answer = {"answer": problem.answer}
    if problem.columns:
        return {**answer, **problem.columns}
    return {"id": problem.id, **answer, **problem.references, **problem.meta}


@dataclass(slots=True)
class Log:
    """Collects what a function logs about a batch; refuses what cannot be recorded."""

    count: int
    """Rollouts of the batch."""
    columns: dict[str, list[Any]] = field(default_factory=dict)
    metrics: dict[str, list[float]] = field(default_factory=dict)

    def log_extra(self, column: str, values: Sequence[Any]) -> None:
        """Record a column with a value for each rollout."""
        listed = list(values)
        if len(listed) != self.count:
            raise ValueError(
                f"log_extra({column!r}, …) got {len(listed)} values for {self.count} completions"
            )
        self.columns[str(column)] = listed

    def log_metric(self, name: str, value: float) -> None:
        """Record a number; a step logs the mean of its batches' numbers."""
        number = float(value)
        if number - number != 0:  # NaN or infinite
            raise ValueError(f"log_metric({name!r}, {value}): log a finite number")
        self.metrics.setdefault(str(name), []).append(number)

    def extra(self, index: int) -> dict[str, Any]:
        """Return what was recorded about one rollout."""
        return {name: values[index] for name, values in self.columns.items()}
