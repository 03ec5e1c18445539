"""Defines what one reward says about the rollouts of a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from selfteach.types import Usage


@dataclass(frozen=True, slots=True)
class Score:
    """Holds one reward of one rollout."""

    value: float | None
    """None where the reward does not apply."""
    failure: str = ""
    """Why a judge gave no number."""
    usage: Usage = field(default_factory=Usage)
    extra: Mapping[str, Any] = field(default_factory=dict)
    """What a function logged about the rollout with ``log_extra``."""


@dataclass(frozen=True, slots=True)
class BatchScores:
    """Holds one reward of all rollouts of a batch, in order."""

    scores: Sequence[Score]
    logged: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """What a function logged with ``log_metric``."""
