"""Samples with several vLLM servers, each of which has proved that it uses the newest weights.

A member that fails is taken out: what it had not completed under the newest label is sampled by
others. A thread loads the newest weights into it as soon as it replies, proves them, and puts it back.
A rollout is a function of (seed, problem, sample, version), whichever member samples it.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from torch import Tensor

from selfteach.errors import EngineError
from selfteach.rollout.vllm.fleet_batch import FleetBatch
from selfteach.rollout.vllm.restart_watch import watch
from selfteach.rollout.vllm.synced_server import SyncedServer
from selfteach.rollout.vllm.vllm_engine import (
    Completion,
    CompletionRequest,
    EngineUnavailable,
    SentWeights,
)
from selfteach.rollout.vllm.weight_channel import WeightChannel
from selfteach.runtime.dispatcher import Dispatcher

log = logging.getLogger("selfteach")

RESTORE_INTERVAL_S = 1.0
"""Before the first attempt to restore a member; each further pause is twice the one before."""
MAX_RESTORE_INTERVAL_S = 10.0


class VllmFleet:
    """Implements `SyncedSampler` on several servers, which get new weights from one channel."""

    def __init__(
        self,
        servers: Sequence[SyncedServer],
        channel: WeightChannel,
        *,
        concurrency: int,
        patience_s: float,
        hedge_after: float | None = None,
    ) -> None:
        self.servers, self._channel, self.patience_s = servers, channel, patience_s
        self.hedge_after = hedge_after
        self.fleet = Dispatcher([server.name for server in servers], concurrency)
        self._weights: SentWeights | None = None
        self._first_V: Tensor | None = None
        self._lasting: set[int] = set()
        self._is_watched = False
        self._lock = threading.Lock()

    @property
    def name(self) -> str:
        """Return all addresses."""
        return ", ".join(server.name for server in self.servers)

    def send(self, named_weights: Sequence[tuple[str, Tensor]], weights: SentWeights) -> None:
        """Pack new weights once, and have all members that are available load them."""
        with self._channel.publishing(named_weights, weights.label):
            self._begin(weights)
            self._at_all(lambda server: server.load(weights))
        if self._channel.main_sends and not self._is_watched:
            self._is_watched = True
            watch(self, VllmFleet.drop_restarted)

    def verify(self, weights: SentWeights) -> None:
        """Take members out that do not prove that they use the weights.

        Raises `EngineUnavailable`, or `EngineError` if waiting is of no use, if none is left.
        """
        self._begin(weights)
        self._at_all(lambda server: server.prove(weights))

    def complete(self, requests: Sequence[CompletionRequest]) -> Iterator[tuple[int, Completion]]:
        """Yield completions of the newest weights from all members, in the order of arrival."""
        yield from FleetBatch(self, requests).completions()

    def drop(self, index: int, error: Exception) -> None:
        """Take a member out after an error, and start to restore it."""
        with self._lock:
            self._note(index, error)
        if self.fleet.take_out(index, str(error)):
            name = self.fleet.name(index)
            log.warning("engine: %s is taken out until it has the newest weights (%s)", name, error)
            work = (weakref.ref(self), index)
            threading.Thread(target=_restored, args=work, name="restore", daemon=True).start()

    def restore(self, index: int) -> bool:
        """Load and prove the newest weights at a member that is out; True if it is back."""
        weights, first_V = self._weights, self._first_V
        if weights is None or first_V is None:
            return False
        try:
            self.servers[index].restore(weights, first_V)
        except (EngineUnavailable, EngineError) as error:
            with self._lock:
                if weights is self._weights:
                    self._note(index, error)
            return False
        with self._lock:
            if weights is not self._weights:
                return False  # it has missed the next update
            self._lasting.discard(index)
            self.fleet.put_back(index)
        log.warning("engine: %s is back", self.fleet.name(index))
        return True

    def drop_restarted(self) -> None:
        """Take members out that have lost their weights, which other ranks cannot restore."""
        for index, server in enumerate(self.servers):
            if not self.fleet.is_out(index) and server.has_lost_weights:
                self.drop(index, EngineUnavailable("it was restarted"))

    def nobody(self) -> EngineUnavailable | EngineError:
        """Return the error of a fleet without an available member."""
        reasons = self.fleet.out
        if len(self._lasting) == len(self.servers):
            return EngineError("; ".join(reasons.values()))
        return EngineUnavailable("; ".join(f"{self.fleet.name(i)}: {reasons[i]}" for i in reasons))

    def _begin(self, weights: SentWeights) -> None:
        """Make these weights the newest: members that are out will be restored with them."""
        with self._lock:
            if self._weights is None or self._weights.label != weights.label:
                self._weights = weights
                self._lasting.clear()
            if self._first_V is None:
                self._first_V = weights.logits_V
        self.fleet.forget_prefixes()

    def _note(self, index: int, error: Exception) -> None:
        """Remember whether waiting may end an error."""
        change = self._lasting.add if isinstance(error, EngineError) else self._lasting.discard
        change(index)

    def _at_all(self, action: Callable[[SyncedServer], None]) -> None:
        """Do something at all available members at once; take those out where it fails."""
        indices = [i for i in range(len(self.servers)) if not self.fleet.is_out(i)]

        def attempt(index: int) -> None:
            try:
                action(self.servers[index])
            except (EngineUnavailable, EngineError) as error:
                self.drop(index, error)

        with ThreadPoolExecutor(len(self.servers), "weights") as pool:
            for done in [pool.submit(attempt, index) for index in indices]:
                done.result()
        if not self.fleet.any_available:
            raise self.nobody()


def _restored(fleet: weakref.ReferenceType[VllmFleet], index: int) -> None:
    """Restore a member as soon as it replies, unless the fleet is used no more."""
    pause_s = RESTORE_INTERVAL_S
    while True:
        time.sleep(pause_s)
        held = fleet()
        if held is None or held.restore(index):
            return
        del held
        pause_s = min(2 * pause_s, MAX_RESTORE_INTERVAL_S)
