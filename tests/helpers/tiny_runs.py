"""The recipe of runs that are damaged, cut off or killed: a few steps in the lab, with checkpoints."""

from __future__ import annotations

from selfteach.config.recipe import Recipe
from selfteach.config.schema import merge, validate

TINY = {
    "model": {"path": "lab:two_styles"},
    "data": {"type": "lab", "train": 8, "validation": 2, "test": 2},
    "sampling": {"max_tokens": 40, "batch_size": 8},
    "critic": {"type": "oracle"},
    "context": {"type": "step_aligned"},
    "train": {
        "steps": 3, "problems_per_step": 2, "group_size": 4, "checkpoint_every": 2, "threads": 1,
    },
    "evaluation": {"every": 2, "validation_k": 1, "test_k": 1},
}  # fmt: skip


def tiny_recipe(**changes: object) -> Recipe:
    return validate(Recipe, merge(TINY, changes), where="test")
