"""Define the request of completions of a prompt that is given as token ids."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from selfteach.protocols import Engine
from selfteach.runtime.seeds import EpisodeKey
from selfteach.types import Problem, Rollout, Sampling


@dataclass(frozen=True, slots=True)
class PromptRequest:
    """Requests completions of a given prompt: the self-teacher's, or an episode up to its next turn."""

    problem: Problem
    prompt_ids: tuple[int, ...]
    samples: tuple[int, ...]
    """Index of each completion among those of the problem; with the seed it keys the random stream."""
    turn: int = 0
    """Index of the turn in its episode, which is in the key too; 0: the first, or a single answer."""
    episodes: tuple[EpisodeKey, ...] = ()
    """Earlier episodes whose environments the completions get anew, one per sample, so that they show
    what is in the prompt; empty: each completion gets an environment with a seed of its own."""


@runtime_checkable
class CompletionEngine(Engine, Protocol):
    """Samples completions of prompts that are given as token ids."""

    @property
    def max_length(self) -> int:
        """Return the most tokens of a prompt and its completion together."""
        ...

    def complete(self, requests: Sequence[PromptRequest], sampling: Sampling) -> list[Rollout]:
        """Return a completion for each sample of each request, in order.

        Requests have equally many samples; ``sampling.samples`` is not used. Each completion is drawn
        from a random stream keyed by (seed, problem, sample, turn, version).
        """
        ...


@runtime_checkable
class ContinuingEngine(CompletionEngine, Protocol):
    """Samples completions, and can hold the states of their tokens for prompts that go on from them."""

    def continuing_sequences(self) -> AbstractContextManager[None]:
        """Hold the states of sampled tokens until the context ends; weights must not change."""
        ...
