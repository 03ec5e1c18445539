"""Episodes in a run folder are read as they were written; single answers have the rows they had."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from two_turns import PROBLEM, episode

from selfteach.errors import CheckpointError
from selfteach.runtime.run_folder import RunFolder
from selfteach.runtime.stored_records import rollout_row, sample_row
from selfteach.types import CritiquedRollout, Rewards, Rollout, TrainingSample, Verdict

EPISODE = dataclasses.replace(
    episode((3, 4), (20, 21), (5,), texts=("a call", "42", "It is 42.")),
    observation="The door is shut.",
    verdict=Verdict(
        False, True, None, "Not opened.", evidence={"turns": 2},
        rewards=Rewards(0.25, {"environment": 0.25, "style": None}),
    ),
)  # fmt: skip
ANSWER = Rollout(PROBLEM, 1, (1, 2), (3, 4), (-0.5, -0.5), "3 4", True, 0)


def test_an_episode_is_read_as_it_was_written(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.save_rollouts("step_000001.000", [EPISODE, ANSWER])
    folder.flushed()
    assert folder.load_rollouts("step_000001.000", {"p": PROBLEM}) == [EPISODE, ANSWER]


def test_a_single_answer_has_the_columns_that_it_had() -> None:
    assert list(rollout_row(ANSWER)) == [
        "problem_id", "problem_sha256", "sample", "prompt_ids", "token_ids", "logps", "text",
        "finished", "policy_version",
    ]  # fmt: skip
    sample = TrainingSample(CritiquedRollout(ANSWER, Verdict(True, True, "x"), None))
    assert "segments" not in sample_row(sample)


def test_a_sample_s_segments_are_ranges_of_its_text() -> None:
    assert EPISODE.verdict is not None
    row = sample_row(TrainingSample(CritiquedRollout(EPISODE, EPISODE.verdict, None)))
    shown = [row["answer"][slice(*segment["span"])] for segment in row["segments"]]
    assert shown == ["a call", "[tool result] 42", "It is 42."]
    assert json.loads(json.dumps(row))["reward"] == 0.25


def test_a_damaged_episode_is_refused_in_one_line(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    row = {**rollout_row(EPISODE), "segments": [{"kind": "model"}]}
    folder.path.joinpath("rollouts").mkdir()
    folder.path.joinpath("rollouts", "step_000001.000.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(CheckpointError) as error:
        folder.load_rollouts("step_000001.000", {"p": PROBLEM})
    assert "\n" not in str(error.value)
