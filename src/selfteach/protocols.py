"""The seams, on one screen: whatever has these methods can take the part's place.

Every part is built in `build.py`, gets values and never its owner, and has a scripted fake in the
tests.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from selfteach.models.lm_head import Scores, chunked_sum
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
    """Defines what is minimised, token by token. Subclass it to inherit `loss`."""

    @property
    def needs_teacher(self) -> bool:
        """Whether the teacher's scores are needed."""
        ...

    def denominators(self, samples: Sequence[TrainingSample]) -> tuple[float, ...]:
        """Return the local denominators of the means that the loss consists of.

        They are summed over all ranks before `token_weights` gets them.
        """
        ...

    def token_weights(
        self, samples: Sequence[TrainingSample], counts: Sequence[float], update: int
    ) -> list[TokenWeights]:
        """Return each token's weight in the loss, after ``update`` updates of the policy's weights."""
        ...

    def per_token(
        self, logits_CV: Tensor, teacher_logits_CV: Tensor | None, batch: Batch, rows: slice
    ) -> Mapping[str, Tensor]:
        """Return ``loss`` and statistics, all [C], of some rows of a batch from the student's logits.

        ``loss`` is differentiated once. The teacher's logits may be overwritten.
        """
        ...

    def loss(
        self, student: Scores, teacher: Scores | None, batch: Batch, chunk_tokens: int
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Sum weight times loss over a micro-batch; also return ``per_token``'s values [N], detached.

        The sum's gradient reaches the student's hidden states and head. An objective that can compute
        the same without the logits of a chunk overrides this.
        """
        return chunked_loss(self, student, teacher, batch, chunk_tokens)


def chunked_loss(
    objective: Objective, student: Scores, teacher: Scores | None, batch: Batch, chunk_tokens: int
) -> tuple[Tensor, Mapping[str, Tensor]]:
    """Compute `Objective.loss` from ``objective.per_token``, ``chunk_tokens`` rows at a time."""

    def per_token(logits_CV: Tensor, rows: slice) -> Mapping[str, Tensor]:
        with torch.no_grad():
            teacher_CV = teacher.logits(rows) if teacher is not None else None
        return objective.per_token(logits_CV, teacher_CV, batch, rows)

    return chunked_sum(per_token, student, batch.weight_N, chunk_tokens=chunk_tokens)
