"""Runs with a critic that is served: the recipe, and the run with the same oracle in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from scripted_critic import oracle_critique
from scripted_server import says

from selfteach.config.recipe import Recipe
from selfteach.config.schema import merge, validate
from selfteach.trainer.loop import run_to_end

CRITIQUED: dict[str, Any] = {
    "model": {"path": "lab:two_styles"},
    "data": {"type": "lab", "train": 12, "validation": 2, "test": 2},
    "sampling": {"max_tokens": 40, "batch_size": 4},
    "context": {"type": "step_aligned"},
    "train": {
        "steps": 3, "problems_per_step": 3, "group_size": 2,
        "checkpoint_every": 2, "threads": 1,
    },
    "evaluation": {"every": 3, "validation_k": 1, "test": False},
}  # fmt: skip
ORACLE = says(oracle_critique)
"""A server that replies as the oracle would."""


def critiqued_by(critic: dict[str, Any], **changes: Any) -> Recipe:
    """Return the recipe of 18 rollouts with a critic."""
    return validate(Recipe, merge(merge(CRITIQUED, {"critic": critic}), changes), where="test")


def served_critic(folder: Path, **settings: Any) -> dict[str, Any]:
    """Return a section of a served oracle whose replies are stored in a folder."""
    return {
        "type": "endpoint", "model": "oracle", "max_tokens": 64, "min_similarity": 0.0,
        "reply_cache": str(folder / "replies.sqlite"), **settings,
    }  # fmt: skip


def run_with_oracle(folder: Path) -> Path:
    """Run with the oracle in this process."""
    run_to_end(critiqued_by({"type": "oracle"}), folder)
    return folder
