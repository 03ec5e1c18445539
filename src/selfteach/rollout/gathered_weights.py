"""An engine beside a sharded policy: whole weights, gathered from all ranks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from selfteach.models.fsdp import whole
from selfteach.protocols import Engine
from selfteach.types import Problem, Rollout, Sampling


class Gathering:
    """An engine on every rank that is handed whole weights where the trainer has pieces."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def generate(self, problems: Sequence[Problem], sampling: Sampling) -> list[Rollout]:
        """As the engine does."""
        return self._engine.generate(problems, sampling)

    def load_weights(self, named_weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """One whole weight at a time; all ranks together."""
        self._engine.load_weights(((name, whole(w)) for name, w in named_weights), version)
