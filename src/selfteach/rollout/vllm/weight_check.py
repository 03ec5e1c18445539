"""Whether an engine really has the weights that it was given: one fixed prompt, asked of both.

A label says who gave weights last, not that they arrived: a loader may skip what it does not know,
and a cache may hold what the old weights said. So after each update the engine says how likely its
likeliest next tokens are behind a prompt that never changes, and the trainer says it too. They have
to agree within a tolerance. And where the trainer's numbers have moved, the engine's must have moved:
numbers that are the same to the last bit are those of the weights before, however small the step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from selfteach.errors import EngineError

MOVED = 1e-3
"""Nats. A smaller step of the trainer may be lost in the engine's rounding; a larger one moves at least
a bit of twenty sums over a whole vocabulary."""


@dataclass(frozen=True, slots=True)
class Probe:
    """The fixed prompt, and the trainer's logits [V] of the token after it, whenever asked."""

    prompt_ids: tuple[int, ...]
    temperature: float
    logits: Callable[[], Tensor]


class Fingerprint:
    """What engine and trainer have said of the probe so far."""

    def __init__(self, probe: Probe, tolerance: float) -> None:
        self.probe, self._tolerance = probe, tolerance
        self._engine: Mapping[int, float] | None = None
        self._trainer: Tensor | None = None

    def check(self, said: Mapping[int, float], logits_V: Tensor, where: str) -> float:
        """Compare an engine's log-probabilities by token id (nats, at the sampling temperature) with
        what the trainer's logits make of them, as the probe gives them now.

        Returns the largest difference to the trainer's. Raises `EngineError` if the engine is stale,
        has other weights, or leaves the temperature out.
        """
        own_V = _logp(logits_V, self.probe.temperature)
        if said == self._engine and self._trainer is not None:
            moved = (own_V - self._trainer)[list(said)].abs().max().item()
            if moved > MOVED:
                raise EngineError(
                    f"engine: {where} is stale: it still has the weights before the update (the "
                    f"trainer has moved by {moved:.2g} nats, the engine by none); nothing was "
                    "trained on its answers: restart it, then call selfteach resume"
                )
        difference = _apart(own_V, said)
        if not difference <= self._tolerance:
            raise EngineError(self._reason(difference, logits_V, said, where))
        if said != self._engine:  # many small steps are held against the first of them
            self._engine, self._trainer = dict(said), own_V
        return difference

    def verify_restart(self, said: Mapping[int, float], where: str) -> None:
        """Compare with what the engine said of the same weights before it was started again.

        The trainer is not asked: it may be a step ahead by then. Raises `EngineError`.
        """
        before = self._engine or {}
        apart = [abs(before[token] - logp) for token, logp in said.items() if token in before]
        if not apart or not max(apart) <= self._tolerance:
            raise EngineError(
                f"engine: {where} was started again with another model: restart it with model.path"
            )

    def _reason(
        self, difference: float, logits_V: Tensor, said: Mapping[int, float], where: str
    ) -> str:
        if _apart(_logp(logits_V, 1.0), said) <= self._tolerance:
            return (
                f"engine: {where} says log-probabilities before the temperature of "
                f"{self.probe.temperature:g}: start it with --logprobs-mode processed_logprobs"
            )
        return (
            f"engine: {where} has other weights than the trainer: log-probabilities of one prompt are "
            f"up to {difference:.2g} nats apart (engine.tolerance = {self._tolerance:g}): serve "
            "model.path itself, unquantised and freshly started, or allow more"
        )


def _logp(logits_V: Tensor, temperature: float) -> Tensor:
    return (logits_V.double() / temperature).log_softmax(-1)


def _apart(own_V: Tensor, said: Mapping[int, float]) -> float:
    """Largest difference; infinite where the engine names a token that the trainer does not have."""
    if not said or max(said) >= len(own_V):
        return float("inf")
    return (
        (own_V[list(said)] - torch.tensor(list(said.values()), dtype=own_V.dtype))
        .abs()
        .max()
        .item()
    )
