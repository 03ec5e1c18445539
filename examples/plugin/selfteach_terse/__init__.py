"""A critic that states the right answer and nothing else."""

from collections.abc import Sequence

from selfteach.types import Critique, CritiqueFailure, Rollout, Verdict


class Terse:
    """Critiques a wrong rollout by its problem's answer; ``right_too = true``: a right one as well."""

    def __init__(self, right_too: bool = False) -> None:
        self.right_too = right_too

    def __call__(
        self, judged: Sequence[tuple[Rollout, Verdict]]
    ) -> list[Critique | CritiqueFailure]:
        """Return one critique per rollout, in order."""
        return [
            CritiqueFailure("already right")
            if verdict.correct and not self.right_too
            else Critique("D", (), rollout.problem.answer, 0)
            for rollout, verdict in judged
        ]
