"""Keeps rewards in the run folder: none is computed or bought twice, and a resume uses the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from typing import Any

from selfteach.errors import CheckpointError
from selfteach.feedback.critics.reply_cache import buying_for
from selfteach.feedback.rewards.scored import BatchScores, Score
from selfteach.runtime.run_folder import RunFolder
from selfteach.runtime.stored_files import reading
from selfteach.runtime.stored_records import plain_columns
from selfteach.types import Rollout, Usage

LOGGED = "logged"
"""Key of a file's last line: what was logged with ``log_metric``."""


class RewardJournal:
    """Stores the rewards of one batch, each function's in a file as soon as it has returned.

    ``name`` is that of the batch, like ``step_000012.003``; ``buyer`` says for whom judges buy replies.
    """

    def __init__(self, run: RunFolder, name: str, buyer: str = "") -> None:
        self._run, self._name, self._buyer = run, name, buyer

    def load(self, reward: str, rollouts: Sequence[Rollout]) -> BatchScores | None:
        """Return the stored scores of a reward; None if there are none.

        Raises `CheckpointError` if the file is damaged, or is about other rollouts.
        """
        file = f"{self._name}.{reward}"
        rows = self._run.load_rewards(file)
        if rows is None:
            return None
        path = self._run.path / "rewards" / f"{file}.jsonl"
        with reading(path):
            logged = rows.pop()[LOGGED]
            keys = [(row["problem_id"], row["sample"]) for row in rows]
            if keys == [rollout.key for rollout in rollouts]:
                return BatchScores([_score_from(row) for row in rows], logged)
        raise CheckpointError(
            f"{path} holds rewards of other rollouts than those of this batch: the data or the batches "
            "have changed since; restore the data, or start a new run in another folder"
        )

    def save(self, reward: str, rollouts: Sequence[Rollout], scores: BatchScores) -> None:
        """Store a reward of all rollouts of the batch."""
        pairs = zip(rollouts, scores.scores, strict=True)
        rows = [*(_row(*pair) for pair in pairs), {LOGGED: dict(scores.logged)}]
        self._run.save_rewards(f"{self._name}.{reward}", rows)

    def buying(self, reward: str) -> AbstractContextManager[None]:
        """Buy a judge's replies in the name of this batch."""
        return buying_for(f"{self._buyer}/{self._name}/{reward}")


def _row(rollout: Rollout, score: Score) -> dict[str, Any]:
    row: dict[str, Any] = {
        "problem_id": rollout.problem.id, "sample": rollout.sample, "reward": score.value,
    }  # fmt: skip
    if score.failure:
        row["failure"] = score.failure
    if score.usage != Usage():
        row["usage"] = asdict(score.usage)
    if score.extra:
        row["extra"] = plain_columns(score.extra)
    return row


def _score_from(row: Mapping[str, Any]) -> Score:
    value = None if row["reward"] is None else float(row["reward"])
    usage = Usage(**row.get("usage", {}))
    return Score(value, row.get("failure", ""), usage, row.get("extra", {}))
