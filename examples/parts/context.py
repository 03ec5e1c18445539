"""A context of one's own: what the teacher is shown of each rollout besides the question."""

from collections.abc import Sequence

from selfteach.types import CritiquedRollout, CritiqueFailure


def part_of_reference(
    critiqued: Sequence[CritiquedRollout], *, lines: int = 2
) -> list[str | CritiqueFailure | None]:
    """Show the last lines of the problem's reference; a rollout that is right teaches nothing."""
    return [
        CritiqueFailure("already right")
        if one.verdict.correct
        else "\n".join(one.rollout.problem.references["reference"].splitlines()[-lines:])
        for one in critiqued
    ]
