"""Runs an engine beside a sharded policy: full weights are gathered from all ranks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from selfteach.models.fsdp import whole
from selfteach.protocols import Engine
from selfteach.types import Problem, Rollout, Sampling


class GatheringEngine:
    """Wraps the engine of each rank: gathers a sharded policy's weights before it loads them."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def generate(self, problems: Sequence[Problem], sampling: Sampling) -> list[Rollout]:
        """Sample with the wrapped engine."""
        return self._engine.generate(problems, sampling)

    def load_weights(self, named_weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Gather one full weight at a time and load it; all ranks call this together."""
        self._engine.load_weights(((name, whole(w)) for name, w in named_weights), version)
