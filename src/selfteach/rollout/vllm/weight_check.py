"""Checks that an engine really uses the weights it was sent, by comparing logprobs of one fixed prompt.

A label tells which weights were sent last, not that they are in use: a loader may skip names that it
does not know, and a cache may hold states of the old weights. So after each update the engine returns
the log-probabilities of its most likely next tokens after a fixed prompt, and the trainer computes
them too. They have to agree within a tolerance. And where the trainer's numbers have moved, the
engine's must have moved: numbers that are bitwise the same are those of the weights before, however
small the step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from selfteach.errors import EngineError

MOVED_NATS = 1e-3
"""A smaller step of the trainer may be lost in the engine's rounding; a larger one changes at least
one bit of twenty sums over a whole vocabulary."""


@dataclass(frozen=True, slots=True)
class Probe:
    """Holds the fixed prompt, and a function that computes the trainer's present logits [V] of the
    token after it."""

    prompt_ids: tuple[int, ...]
    temperature: float
    logits: Callable[[], Tensor]


class WeightCheck:
    """Remembers the logprobs of the probe, of engine and trainer, and compares new ones with them."""

    def __init__(self, probe: Probe, tolerance: float) -> None:
        self.probe, self._tolerance = probe, tolerance
        self._engine: Mapping[int, float] | None = None
        self._trainer: Tensor | None = None

    def compare(self, engine_logps: Mapping[int, float], logits_V: Tensor, name: str) -> float:
        """Compare an engine's log-probabilities by token id (nats, at the sampling temperature) with
        those of the trainer's logits, as the probe returns them now. ``name`` is the engine's.

        Returns the largest absolute difference. Raises `EngineError` if the engine is stale, has
        other weights, or leaves the temperature out.
        """
        trainer_V = _logp(logits_V, self.probe.temperature)
        if engine_logps == self._engine and self._trainer is not None:
            moved = (trainer_V - self._trainer)[list(engine_logps)].abs().max().item()
            if moved > MOVED_NATS:
                raise EngineError(
                    f"engine: {name} is stale: it still has the weights before the update (the "
                    f"trainer's logprobs changed by {moved:.2g} nats, the engine's did not); nothing "
                    "was trained on its rollouts: restart it, then call selfteach resume"
                )
        difference = _max_difference(trainer_V, engine_logps)
        if not difference <= self._tolerance:
            raise EngineError(self._reason(difference, logits_V, engine_logps, name))
        if engine_logps != self._engine:  # many small steps are compared with the first of them
            self._engine, self._trainer = dict(engine_logps), trainer_V
        return difference

    def verify_restart(self, engine_logps: Mapping[int, float], name: str) -> None:
        """Compare with the engine's logprobs of the same weights before it was restarted.

        The trainer is left out: it may be a step ahead by then. Raises `EngineError`.
        """
        before = self._engine or {}
        differences = [
            abs(before[token] - logp) for token, logp in engine_logps.items() if token in before
        ]
        if not differences or not max(differences) <= self._tolerance:
            raise EngineError(
                f"engine: {name} was restarted with another model: restart it with model.path"
            )

    def restarted(self, engine_logps: Mapping[int, float], logits_V: Tensor) -> None:
        """Remember the weights with which an engine was restarted: `compare` tells if it keeps them.

        ``logits_V`` are the trainer's of the run's first weights. A difference from these that the
        present weights have, the engine's numbers must show too.
        """
        if engine_logps != self._engine:
            trainer_V = _logp(logits_V, self.probe.temperature)
            self._engine, self._trainer = dict(engine_logps), trainer_V

    def _reason(
        self, difference: float, logits_V: Tensor, engine_logps: Mapping[int, float], name: str
    ) -> str:
        if _max_difference(_logp(logits_V, 1.0), engine_logps) <= self._tolerance:
            return (
                f"engine: {name} returns log-probabilities before the temperature of "
                f"{self.probe.temperature:g}: start it with --logprobs-mode processed_logprobs"
            )
        return (
            f"engine: {name} has other weights than the trainer: log-probabilities of one prompt "
            f"differ by up to {difference:.2g} nats (engine.tolerance = {self._tolerance:g}): serve "
            "model.path itself, unquantised and freshly started, or raise engine.tolerance"
        )


def _logp(logits_V: Tensor, temperature: float) -> Tensor:
    return (logits_V.double() / temperature).log_softmax(-1)


def _max_difference(trainer_V: Tensor, engine_logps: Mapping[int, float]) -> float:
    """Return the largest difference; infinite if the trainer lacks one of the engine's tokens."""
    if not engine_logps or max(engine_logps) >= len(trainer_V):
        return float("inf")
    engine_N = torch.tensor(list(engine_logps.values()), dtype=trainer_V.dtype)
    return (trainer_V[list(engine_logps)] - engine_N).abs().max().item()
