"""What reward functions get of episodes: turns and replies as messages, in TRL's form."""

from __future__ import annotations

import dataclasses

from two_turns import PROBLEM, episode

from selfteach.episodes import Segment
from selfteach.feedback.rewards.trl_arguments import reward_arguments
from selfteach.types import Rollout


def completion(ids: tuple[int, ...]) -> str:
    return f"ids {' '.join(map(str, ids))}"


def test_an_episode_is_a_list_of_messages() -> None:
    one = episode((3, 4), (20, 21), (5,), texts=("a call", "42", "It is 42."))
    over = Segment("environment", 5, 5, "no turn is left", "budget")
    one = dataclasses.replace(one, segments=(*one.segments, over), finished=False)
    answer = Rollout(PROBLEM, 1, (1, 2), (3, 4), (-0.5, -0.5), "3 4", True, 0)
    arguments = reward_arguments([one, answer], completion, None)
    assert arguments["prompts"] == [[{"role": "user", "content": "q"}], "q"]
    assert arguments["completions"] == [
        [
            {"role": "assistant", "content": "ids 3 4"},
            {"role": "tool", "content": "42"},
            {"role": "assistant", "content": "ids 5"},
        ],
        "ids 3 4",
    ]
    assert arguments["completion_ids"] == [[3, 4, 20, 21, 5], [3, 4]]
