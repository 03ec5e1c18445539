"""Samples with one vLLM that was sent this run's weights, and proves that they are the ones in use.

A completion counts only if the engine's weight label was read before and after it, and both times was
the label that this run set with its last weights. Another run that loads weights changes the label
first, and an engine that was restarted has none: so no completion can come from weights other than
those of its version. That the weights behind the label are the trainer's is what `WeightCheck` tests.

The first rank that notices a restart reloads the weights, under a mutex and with a new suffix of the
label, so that the other ranks notice it too. Weights that travel in memory are rank 0's: it looks for
restarts between its batches too, and the others wait for it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress

from torch import Tensor

from selfteach.errors import EngineError
from selfteach.rollout.vllm.restart_watch import watch
from selfteach.rollout.vllm.vllm_engine import (
    RELOAD_SEPARATOR,
    Completion,
    CompletionRequest,
    EngineUnavailable,
    SentWeights,
    VllmBackend,
)
from selfteach.rollout.vllm.weight_check import WeightCheck
from selfteach.runtime.distributed import Ranks

LABEL_CHECK_INTERVAL_S = 2.0
"""Between reads of the label while completions arrive; what arrived since the last read is sampled
again when a server dies."""


class SyncedBackend:
    """Implements `SyncedSampler` on one `VllmBackend`."""

    def __init__(self, backend: VllmBackend, weight_check: WeightCheck, ranks: Ranks) -> None:
        self._backend, self._weight_check, self._ranks = backend, weight_check, ranks
        self._label = ""
        self._label_before: str | None = None
        self._was_restarted = self._is_watched = False
        self.loading = threading.Lock()
        """Held while weights are loaded: by an update, or by a thread that restores the engine."""

    @property
    def name(self) -> str:
        """Return the engine's name in messages."""
        return self._backend.name

    @property
    def patience_s(self) -> float:
        """Return how long the engine may be unavailable, in seconds."""
        return self._backend.patience_s

    def send(self, named_weights: Sequence[tuple[str, Tensor]], weights: SentWeights) -> None:
        """Load new weights."""
        with self.loading:
            self._backend.load_weights(named_weights, weights.label)
            self._label = weights.label
        if self._backend.main_reloads and not self._is_watched:
            self._is_watched = True
            watch(self, SyncedBackend.reload_if_lost)

    def verify(self, weights: SentWeights) -> None:
        """Compare label and probe with those of the weights that were sent."""
        self._label = weights.label
        self._reload_if_restarted()
        self._weight_check.compare(self._probe_engine(), weights.logits_V, self.name)
        self._was_restarted = False

    def reload_if_lost(self) -> None:
        """Reload an engine that was restarted, unless it is unavailable: sampling reports that."""
        with self.loading, suppress(EngineUnavailable, EngineError):
            if self._backend.current_label(self._label) is None:
                self._reload(None)

    def complete(self, requests: Sequence[CompletionRequest]) -> Iterator[tuple[int, Completion]]:
        """Yield completions after which the label was still the same."""
        before = self._label_before
        self._reload_if_restarted()
        if self._was_restarted or self._label_before != before:
            self._weight_check.verify_restart(self._probe_engine(), self.name)
            self._was_restarted = False
        unchecked: list[tuple[int, Completion]] = []
        checked_at = time.monotonic()
        for indexed in self._backend.complete(requests, self._label):
            unchecked.append(indexed)
            if time.monotonic() > checked_at + LABEL_CHECK_INTERVAL_S:
                self.require_same_label(self.read_label())
                yield from unchecked
                unchecked, checked_at = [], time.monotonic()
        self.require_same_label(self.read_label())
        yield from unchecked

    def read_label(self) -> str | None:
        """Return the engine's label. Raises `EngineError` if it is not that of the newest weights."""
        return self.checked_label(self._backend.current_label(self._label))

    def checked_label(self, label: str | None) -> str | None:
        """Return a label. Raises `EngineError` if it is not that of the newest weights."""
        if label is not None and label.partition(RELOAD_SEPARATOR)[0] != self._label:
            raise EngineError(
                f"engine: {self.name} is stale: it has the weights {label!r} where this run "
                f"loaded {self._label!r}; another run uses it. Its rollouts are discarded and nothing "
                "was trained on them: give each run its own engine"
            )
        return label

    def require_same_label(self, label: str | None) -> None:
        """Raise `EngineUnavailable` unless this is the label that was there before."""
        # Another suffix: another rank reloaded our weights in between, before which the engine had
        # others.
        if label != self._label_before or self._label_before is None:
            raise EngineUnavailable("it was restarted")

    def _reload_if_restarted(self) -> None:
        """Reload the weights of an engine that was restarted, which has none."""
        label = self.read_label()
        if label is None:
            self._was_restarted = True
            self._reload(None)
        self._label_before = label or self.read_label()

    def _reload(self, label: str | None) -> None:
        with self._ranks.mutex():
            if self._backend.current_label(self._label) == label:  # no other rank was faster
                self._backend.reload_weights(self._label)

    def _probe_engine(self) -> Mapping[int, float]:
        probe = self._weight_check.probe
        request = CompletionRequest(probe.prompt_ids, 0, 1, probe.temperature, ())
        return self._backend.top_logprobs(request, self._label)
