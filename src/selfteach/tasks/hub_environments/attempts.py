"""Defines what an environment is here: rows, and rewards of what a policy wrote about them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from selfteach.tasks.sources.source_row import Row


@dataclass(frozen=True, slots=True)
class Attempt:
    """Holds one completion of an environment's row."""

    row: int
    """Index among the environment's rows; attempts at the same row are a group."""
    text: str
    """The completion with its thought, without special tokens."""
    finished: bool
    """False if it was truncated at the token limit."""


Outcome = float | str
"""A reward, or why there is none (what the function raised)."""


class SingleTurn(Protocol):
    """Wraps an environment of one of the library's two generations."""

    label: str
    """Name for error messages."""
    weights: Mapping[str, float]
    """Weight of each reward by its name, in the order in which they are computed."""
    failed: float | None
    """Value of a reward whose function raised, as the library has it: 0, or None for no reward."""

    def rows(self, limit: int | None) -> list[Row]:
        """Return the rows of the training set, or of the only set. Raises `DataError`."""
        ...

    def held_out(self, limit: int | None) -> list[Row]:
        """Return the rows of the evaluation set, numbered on from the others; empty without one."""
        ...

    async def score(self, attempts: Sequence[Attempt]) -> list[dict[str, Outcome]]:
        """Return the rewards of each attempt by name."""
        ...


def reason_of(error: BaseException) -> str:
    """Return in one line what a reward function raised."""
    text = " ".join(str(error).split())
    return f"raised: {type(error).__name__}: {text[:200]}"


def listed_weights(weights: Mapping[str, float]) -> str:
    """Return names and weights for a person."""
    return ", ".join(f"{name} (weight {weight:g})" for name, weight in weights.items())


def distinct(name: str, taken: Mapping[str, Any]) -> str:
    """Return a reward's name as metrics and files take it, with a number if it is taken."""
    plain = "".join(c if c.isascii() and (c.isalnum() or c in "_.-") else "_" for c in name).strip(
        "_.-"
    )
    plain = plain or "reward"
    number = 1
    while (candidate := plain if number == 1 else f"{plain}_{number}") in taken:
        number += 1
    return candidate
