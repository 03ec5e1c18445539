"""The seams, on one screen: whatever has these methods can take the part's place.

Every part is built in `build.py`, gets values and never its owner, and has a scripted fake in the
tests.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor

from selfteach.models.lm_head import Scores
from selfteach.types import (
    Batch,
    Critique,
    CritiquedRollout,
    CritiqueFailure,
    Problem,
    Rollout,
    Sampling,
    Sequences,
    TokenWeights,
    TrainingSample,
    Verdict,
)


@runtime_checkable
class Engine(Protocol):
    """Samples answers. The draw of an answer depends only on (seed, question, sample, version)."""

    def generate(self, problems: Sequence[Problem], sampling: Sampling) -> list[Rollout]:
        """``sampling.samples`` answers to each problem, problem by problem."""
        ...

    def load_weights(self, named_weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Sample with these weights from now on, and sign answers with this version."""
        ...


@runtime_checkable
class Verifier(Protocol):
    """Says whether an answer is right."""

    def __call__(self, problem: Problem, text: str) -> Verdict:
        """Judge an answer's text."""
        ...


@runtime_checkable
class Critic(Protocol):
    """Marks answers step by step. Frozen; never sees the trainer; may fail, with a reason."""

    def __call__(
        self, judged: Sequence[tuple[Rollout, Verdict]]
    ) -> list[Critique | CritiqueFailure]:
        """One critique, or the reason for none, per answer, in order."""
        ...


@runtime_checkable
class Context(Protocol):
    """Decides what the self-teacher is shown. Sees all answers of a step, since some need others."""

    def __call__(self, critiqued: Sequence[CritiquedRollout]) -> list[str | CritiqueFailure]:
        """One context, or the reason for none, per answer, in order."""
        ...


@runtime_checkable
class Teacher(Protocol):
    """The self-teacher's weights: scores answers with no gradient, follows the policy or does not."""

    def score(self, sequences: Sequences) -> Scores:
        """Logits of the answers' tokens."""
        ...

    def update(self) -> None:
        """Called after each optimizer step."""
        ...

    def state(self) -> Mapping[str, Tensor]:
        """What a resume needs, by name; empty if it can be had from elsewhere."""
        ...

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take up a saved state."""
        ...


@runtime_checkable
class Objective(Protocol):
    """What is minimised, per token."""

    @property
    def needs_teacher(self) -> bool:
        """True if the teacher's scores are asked for."""
        ...

    def denominators(self, samples: Sequence[TrainingSample]) -> tuple[float, ...]:
        """The denominators of the means that the loss is made of: the local counts, to be added up
        over all ranks before `weigh` gets them."""
        ...

    def token_weights(
        self, samples: Sequence[TrainingSample], counts: Sequence[float], update: int
    ) -> list[TokenWeights]:
        """How much each token of each sample counts, after ``update`` updates of the weights."""
        ...

    def per_token(
        self, logits_CV: Tensor, teacher_logits_CV: Tensor | None, batch: Batch, rows: slice
    ) -> Mapping[str, Tensor]:
        """``loss`` and statistics, all [C], of some rows of a batch from the student's logits.

        The loss is differentiated once. The teacher's logits are nobody else's: they may be written to.
        """
        ...
