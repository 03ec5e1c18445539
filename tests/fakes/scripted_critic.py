"""A critic behind a server for the lab's rollouts: the oracle's critiques as text."""

from __future__ import annotations

import re
from typing import Any

from selfteach.models.model_path import BASES
from selfteach.tasks.lab import lab_oracle
from selfteach.tasks.lab.worlds import world_of

WORLD = world_of(BASES / "two_styles")


def between(name: str, text: str) -> str:
    match = re.search(rf"=+ {name} BEGINS =+\n(.*?)\n=+ {name} ENDS", text, re.DOTALL)
    assert match is not None, text
    return match.group(1)


def oracle_critique(body: dict[str, Any]) -> str:
    """Return the lab oracle's critique of the rollout in a request, as text."""
    prompt = body["messages"][-1]["content"]
    question, rollout = between("PROBLEM", prompt).split(), between("ATTEMPT", prompt)
    critique = lab_oracle.critique_rollout(
        WORLD, question, rollout, finished="cut off" not in prompt
    )
    return "\n".join([*(step.text for step in critique.steps), f"# {critique.answer}"])
