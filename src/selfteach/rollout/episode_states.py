"""Holds keys and values of episodes between their turns, so that no token is run twice."""

from __future__ import annotations

from collections.abc import Sequence

from selfteach.models.prefix_cache import States
from selfteach.rollout.prompt_request import PromptRequest

MAX_BYTES = 4 * 2**30
"""Largest total size of the keys and values of a batch's episodes. It does not depend on what memory is
free: a run on the same device adds its floats in the same order each time."""

Key = tuple[str, int]
"""A problem's id and the index of the completion among its samples."""


class EpisodeStates:
    """Holds keys and values of the sequences that one batch of episodes has so far.

    Once they are larger than ``max_bytes`` nothing more is stored, and each turn runs all tokens again.
    """

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._sequences: dict[Key, tuple[tuple[int, ...], States]] = {}
        self._too_large = False

    def of(self, requests: Sequence[PromptRequest]) -> list[States] | None:
        """Return the states of each prompt's first tokens; None if one of them has none."""
        stored = []
        for request in requests:
            ids, states = self._sequences.get((request.problem.id, request.samples[0]), ((), None))
            prompt = request.prompt_ids
            if states is None or len(ids) >= len(prompt) or prompt[: len(ids)] != ids:
                return None
            stored.append(states)
        return stored

    def replace(self, sequences: dict[Key, tuple[tuple[int, ...], States]]) -> None:
        """Store the token ids of sequences and their states, in place of those of the turn before."""
        size = sum(x.nbytes for _, states in sequences.values() for layer in states for x in layer)
        self._too_large = self._too_large or size > self._max_bytes
        self._sequences = {} if self._too_large else sequences
