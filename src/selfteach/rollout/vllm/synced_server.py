"""Drives one vLLM server of a fleet: it can miss new weights, and gets them when it is back."""

from __future__ import annotations

from concurrent.futures import Future

from torch import Tensor

from selfteach.errors import EngineError
from selfteach.rollout.vllm.server_client import VllmServer
from selfteach.rollout.vllm.synced_backend import SyncedBackend
from selfteach.rollout.vllm.vllm_engine import (
    LABEL_PREFIX,
    Completion,
    CompletionRequest,
    EngineUnavailable,
    SentWeights,
)
from selfteach.rollout.vllm.weight_check import WeightCheck
from selfteach.runtime.distributed import Ranks


class SyncedServer(SyncedBackend):
    """Is a `SyncedBackend` that loads weights again and processes requests in the background."""

    def __init__(self, server: VllmServer, weight_check: WeightCheck, ranks: Ranks) -> None:
        super().__init__(server, weight_check, ranks)
        self._server = server
        self._proved = True
        """False after weights that the server does not use, whatever its label says."""

    def load(self, weights: SentWeights) -> None:
        """Load new weights, which the channel holds."""
        with self.loading:
            self._server.reload_weights(weights.label)
            self._label = weights.label

    def prove(self, weights: SentWeights) -> None:
        """Do what `verify` does, at a time when no weights are being loaded."""
        with self.loading:
            self._proved = False
            self.verify(weights)
            self._proved = True

    def restore(self, weights: SentWeights, first_V: Tensor) -> None:
        """Load the newest weights into a server that was away, and prove that it uses them.

        ``first_V`` are the trainer's logits of the first weights that this run has sent: a server that
        was restarted has those with which it was started.
        """
        with self.loading:
            self._label = weights.label
            label = self._server.current_label(self._label)
            if label is None and not self._server.holds_adapters:
                self._weight_check.restarted(self._probe_engine(), first_V)
            if label is None or self._is_earlier(label):
                self._reload(label)
            elif not self._proved:
                self._reload(self.checked_label(label))  # never over the weights of another run
            self._label_before = self.read_label()
            self.require_same_label(self._label_before)
            self._proved = False
            self._weight_check.compare(self._probe_engine(), weights.logits_V, self.name)
            self._proved = True

    @property
    def has_lost_weights(self) -> bool:
        """Return True if the server was restarted since it got its weights; False if it is unknown."""
        if not self._label or not self.loading.acquire(blocking=False):
            return False
        try:
            return self._server.current_label(self._label) is None
        except (EngineUnavailable, EngineError):
            return False
        finally:
            self.loading.release()

    def start_completion(self, request: CompletionRequest) -> Future[Completion]:
        """Start one request."""
        return self._server.start_completion(request, self._label)

    def start_label(self) -> Future[str | None]:
        """Start to read the label, which `require_unchanged` takes."""
        return self._server.start_label(self._label)

    def require_unchanged(self, label: str | None) -> None:
        """Raise `EngineUnavailable` or `EngineError` unless the label is that of before."""
        self.require_same_label(self.checked_label(label))

    def _is_earlier(self, label: str) -> bool:
        """Return True for a label of weights that this run has sent before the newest."""
        run, load, _ = _label_parts(self._label)
        other_run, other_load, _ = _label_parts(label)
        return other_run == run and other_load < load


def _label_parts(label: str) -> tuple[str, int, str]:
    """Return a label's run, the number of its load, and the rest; load 0 for labels of others."""
    prefix, _, rest = label.partition("-")
    run, _, rest = rest.partition("-")
    load, _, rest = rest.partition("-")
    is_ours = prefix == LABEL_PREFIX and load.isdecimal()
    return (run, int(load), rest) if is_ours else (label, 0, "")
