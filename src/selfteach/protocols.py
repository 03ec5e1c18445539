"""Define the interfaces of the components; any object with these methods can replace one.

`trainer.build` constructs every component from the recipe; the tests have a scripted fake of each.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from selfteach.episodes import EnvironmentReply, Turn
from selfteach.models.lm_head import Scores, chunked_sum
from selfteach.types import (
    Batch,
    CriticSolution,
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
    """Samples rollouts, each from a random stream keyed by (seed, problem, sample, version)."""

    def generate(self, problems: Sequence[Problem], sampling: Sampling) -> list[Rollout]:
        """Return ``sampling.samples`` rollouts of each problem, problem by problem."""
        ...

    def load_weights(self, named_weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Load the weights to sample with from now on; ``version`` is recorded in each rollout."""
        ...


@runtime_checkable
class Environment(Protocol):
    """Runs one episode: replies to each turn of the policy, and may say at the end how it went.

    Every episode has an object of its own, and many are run side by side, each call in a thread and
    with a deadline. What one raises ends its episode as an event, never the run, unless no episode of a
    batch can begin. A method ``close``, if there is one, is called when the batch's episodes are over.
    """

    @property
    def tools(self) -> Sequence[Mapping[str, Any]]:
        """Return the tools that the prompt offers, as JSON schemas; the same for all episodes."""
        ...

    def reset(self, problem: Problem, seed: int) -> str:
        """Begin the episode of a problem; return what is shown behind the question, "" for nothing.

        The seed depends on seed, problem, sample and policy version, or on seed and problem alone
        (``environment.seed_by``): a resume gets the same.
        """
        ...

    def step(self, turn: Turn) -> EnvironmentReply:
        """Reply to a turn of the policy, or end the episode."""
        ...

    def verdict(self) -> Verdict | None:
        """Return the verdict on the episode, which is over; None: the task's verifier reads the last
        turn."""
        ...


@runtime_checkable
class Verifier(Protocol):
    """Verifies the final answer of a completion."""

    def __call__(self, problem: Problem, text: str) -> Verdict:
        """Return the verdict on a completion's text."""
        ...


@runtime_checkable
class Reward(Protocol):
    """Says what rollouts are worth, whole groups of them at a time."""

    def __call__(self, judged: Sequence[tuple[Rollout, Verdict]]) -> list[Verdict]:
        """Return the verdicts with the rewards of each rollout, in order.

        The verdicts given are the verifier's; a reward may replace whether a rollout is a success.
        """
        ...


@runtime_checkable
class Critic(Protocol):
    """Critiques rollouts step by step: a frozen model or a program, not a value function."""

    def __call__(
        self, judged: Sequence[tuple[Rollout, Verdict]]
    ) -> list[Critique | CritiqueFailure]:
        """Return a critique, or the reason why there is none, of each rollout, in order."""
        ...


@runtime_checkable
class SolvingCritic(Critic, Protocol):
    """Is a critic that can also solve a question by itself."""

    def solve(self, problems: Sequence[Problem]) -> list[CriticSolution]:
        """Return the critic's solution of each problem, in order."""
        ...


@runtime_checkable
class Context(Protocol):
    """Builds the context that the self-teacher is shown besides the question."""

    def __call__(
        self, critiqued: Sequence[CritiquedRollout]
    ) -> Sequence[str | CritiqueFailure | None]:
        """Return a context, or the reason why there is none, for each rollout, in order.

        None means that the teacher is shown the question alone. ``critiqued`` are all rollouts of a
        step, since some contexts show a rollout of another sample.
        """
        ...


@runtime_checkable
class Teacher(Protocol):
    """Scores rollouts with the self-teacher's weights, which may follow the policy; no gradient."""

    def score(self, sequences: Sequences) -> Scores:
        """Return the logits of the rollouts' tokens."""
        ...

    def update(self) -> None:
        """Update the teacher's weights; called after each optimizer step."""
        ...

    def state(self) -> Mapping[str, Tensor]:
        """Return the tensors that a resume needs, by name; may be empty."""
        ...

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore the tensors that `state` returned."""
        ...


@runtime_checkable
class Objective(Protocol):
    """Computes the loss, token by token. Subclass it to inherit `loss`."""

    @property
    def needs_teacher(self) -> bool:
        """Return True if the loss needs the teacher's scores."""
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
