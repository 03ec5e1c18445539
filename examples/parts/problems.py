"""Problems of one's own: called once with the name of each split, returns problems or rows of them."""

from collections.abc import Iterator
from typing import Any, Literal

from selfteach.tasks.lab import lab_task
from selfteach.tasks.lab.world import World
from selfteach.tasks.lab.worlds import WORLDS

Split = Literal["train", "validation", "test"]


def from_the_lab(
    split: Split, *, world: str = "two_styles", count: int = 16
) -> Iterator[dict[str, Any]]:
    """Yield rows with the columns of a file: the lab's problems of a split, without their ids."""
    for problem in lab_task.problems(World(WORLDS[world]), split, count):
        yield {
            "question": problem.question,
            "answer": problem.answer,
            "reference": problem.references["reference"],
        }
