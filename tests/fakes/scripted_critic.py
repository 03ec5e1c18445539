"""What a critic behind a server says of the lab's answers: the oracle's own words, as text."""

from __future__ import annotations

import re
from typing import Any

from selfteach.models.loading import BASES
from selfteach.tasks.lab import lab_oracle
from selfteach.tasks.lab.worlds import world_of

WORLD = world_of(BASES / "two_styles")


def between(name: str, text: str) -> str:
    found = re.search(rf"=+ {name} BEGINS =+\n(.*?)\n=+ {name} ENDS", text, re.DOTALL)
    assert found is not None, text
    return found.group(1)


def criticises(body: dict[str, Any]) -> str:
    """What the lab's oracle says, as text."""
    asked = body["messages"][-1]["content"]
    question, answer = between("PROBLEM", asked).split(), between("ATTEMPT", asked)
    said = lab_oracle.criticise(WORLD, question, answer, finished="cut off" not in asked)
    return "\n".join([*(step.text for step in said.steps), f"# {said.answer}"])
