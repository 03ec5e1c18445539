"""A critic of one's own: writes a critique of each rollout, or says why there is none."""

from collections.abc import Sequence
from dataclasses import dataclass

from selfteach.tasks.segmentation import Splitter
from selfteach.types import Critique, CritiqueFailure, CritiqueStep, Rollout, Verdict


@dataclass
class FromReference:
    """Keeps the first steps of a rollout and goes on with the problem's reference.

    ``split_steps`` is asked of the run by its name; ``keep`` is an option of the recipe.
    """

    split_steps: Splitter
    keep: int = 1

    def __call__(
        self, judged: Sequence[tuple[Rollout, Verdict]]
    ) -> list[Critique | CritiqueFailure]:
        """Return one critique per rollout, in order."""
        return [self._critique(rollout, verdict) for rollout, verdict in judged]

    def _critique(self, rollout: Rollout, verdict: Verdict) -> Critique | CritiqueFailure:
        if verdict.correct:
            return CritiqueFailure("already right")
        spans = self.split_steps(rollout.text)[: self.keep]
        kept_steps = [
            CritiqueStep(rollout.text[begin:end], "kept", rollout.text[begin:end])
            for begin, end in spans
        ]
        reference = rollout.problem.references["reference"].splitlines()[len(kept_steps) :]
        added = [CritiqueStep(line, "new") for line in reference]
        return Critique("D", (*kept_steps, *added), rollout.problem.answer, len(kept_steps))
