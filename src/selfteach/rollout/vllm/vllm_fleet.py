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
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

from torch import Tensor

from selfteach.errors import EngineError
from selfteach.rollout.vllm import synced_backend
from selfteach.rollout.vllm.synced_server import SyncedServer
from selfteach.rollout.vllm.vllm_engine import (
    Completion,
    CompletionRequest,
    EngineUnavailable,
    SentWeights,
)
from selfteach.rollout.vllm.weight_sync import WeightFolder
from selfteach.runtime.dispatcher import Dispatcher

log = logging.getLogger("selfteach")

RESTORE_INTERVAL_S = 1.0
"""Before the first attempt to restore a member; each further pause is twice the one before."""
MAX_RESTORE_INTERVAL_S = 10.0
NAP_S = 0.25
"""Longest wait for replies before a look at which members are back."""


class VllmFleet:
    """Implements `SyncedSampler` on several servers, which read new weights from one folder."""

    def __init__(
        self,
        servers: Sequence[SyncedServer],
        folder: WeightFolder,
        *,
        concurrency: int,
        patience_s: float,
    ) -> None:
        self.servers, self._folder, self.patience_s = servers, folder, patience_s
        self.fleet = Dispatcher([server.name for server in servers], concurrency)
        self._weights: SentWeights | None = None
        self._first_V: Tensor | None = None
        self._lasting: set[int] = set()
        self._lock = threading.Lock()

    @property
    def name(self) -> str:
        """Return all addresses."""
        return ", ".join(server.name for server in self.servers)

    def send(self, named_weights: Sequence[tuple[str, Tensor]], weights: SentWeights) -> None:
        """Write new weights once, and have all members that are available load them."""
        self._folder.write(named_weights, weights.label)
        self._begin(weights)
        self._at_all(lambda server: server.load_from_disk(weights))

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


@dataclass(frozen=True, slots=True)
class SentRequest:
    """Describes a request in flight."""

    member: int
    index: int
    began: float


class FleetBatch:
    """Samples one batch of requests: sends each to a member, and again if that one fails."""

    def __init__(self, fleet: VllmFleet, requests: Sequence[CompletionRequest]) -> None:
        self._fleet, self._requests = fleet, requests
        self._waiting = deque(range(len(requests)))
        self._running: dict[Future[Completion], SentRequest] = {}
        self._unchecked: defaultdict[int, list[tuple[int, Completion]]] = defaultdict(list)
        self._checks: dict[Future[str | None], tuple[int, list[tuple[int, Completion]]]] = {}
        self._checked_at: defaultdict[int, float] = defaultdict(time.monotonic)
        self._failures: Counter[int] = Counter()
        self._prefixes = [(hash(request.prompt_ids),) for request in requests]
        """What identifies the prompts: rollouts of one problem have all of theirs in common."""
        for prefix in dict.fromkeys(self._prefixes):
            fleet.fleet.expect(prefix)

    def completions(self) -> Iterator[tuple[int, Completion]]:
        """Yield (index of the request, completion) after the label was seen behind it.

        Raises `EngineUnavailable` or `EngineError` if no member is available, or if a request has
        failed more often than there are members.
        """
        try:
            while self._waiting or self._running or self._checks or any(self._unchecked.values()):
                self._send()
                self._start_checks()
                futures = [*self._running, *self._checks]
                if not futures and self._waiting and not self._fleet.fleet.any_available:
                    raise self._fleet.nobody()
                for done in wait(futures, NAP_S, FIRST_COMPLETED).done:
                    if done in self._running:
                        self._receive(done)  # type: ignore[arg-type]
                    elif done in self._checks:
                        yield from self._confirmed(done)  # type: ignore[arg-type]
        finally:
            for future in [*self._running, *self._checks]:
                future.cancel()
            for sent in self._running.values():
                self._finish(sent, unused=True)

    def _send(self) -> None:
        """Send as many waiting requests as members may take."""
        while self._waiting:
            waiting = ((self._prefixes[index], ()) for index in self._waiting)
            assigned = self._fleet.fleet.assign_one(waiting)
            if assigned is None:
                return
            position, member = assigned
            index, began = self._waiting[position], time.monotonic()
            del self._waiting[position]
            future = self._fleet.servers[member].start_completion(self._requests[index])
            self._running[future] = SentRequest(member, index, began)

    def _receive(self, future: Future[Completion]) -> None:
        sent = self._running.pop(future)
        try:
            completion = future.result()
        except (EngineUnavailable, EngineError) as error:
            self._finish(sent, failed=True)
            self._drop(sent.member, error, [sent.index])
            self._failures[sent.index] += 1
            if self._failures[sent.index] > len(self._fleet.servers):
                raise
            return
        self._finish(sent)
        self._unchecked[sent.member].append((sent.index, completion))

    def _start_checks(self) -> None:
        """Read the labels of members whose completions wait for it, at times and at the end."""
        checking = {member for member, _ in self._checks.values()}
        busy = {sent.member for sent in self._running.values()}
        now = time.monotonic()
        for member in [i for i, unchecked in self._unchecked.items() if unchecked]:
            idle = member not in busy and not self._waiting
            due = now > self._checked_at[member] + synced_backend.LABEL_CHECK_INTERVAL_S
            if member not in checking and (idle or due):
                check = self._fleet.servers[member].start_label()
                self._checks[check] = member, self._unchecked.pop(member)
                self._checked_at[member] = now

    def _confirmed(self, check: Future[str | None]) -> Iterable[tuple[int, Completion]]:
        """Return the completions after which the label was still the same; others are sampled again."""
        member, completions = self._checks.pop(check)
        try:
            self._fleet.servers[member].require_unchanged(check.result())
        except (EngineUnavailable, EngineError) as error:
            self._drop(member, error, [index for index, _ in completions])
            return []
        return completions

    def _drop(self, member: int, error: Exception, lost: list[int]) -> None:
        """Take a member out; all that it has not proved to be of the newest weights is sent again."""
        self._fleet.drop(member, error)
        lost += [index for index, _ in self._unchecked.pop(member, [])]
        for check in [check for check, (at, _) in self._checks.items() if at == member]:
            check.cancel()
            lost += [index for index, _ in self._checks.pop(check)[1]]
        for future in [future for future, sent in self._running.items() if sent.member == member]:
            future.cancel()
            sent = self._running.pop(future)
            self._finish(sent, unused=True)
            lost.append(sent.index)
        self._waiting.extendleft(sorted(lost, reverse=True))

    def _finish(self, sent: SentRequest, *, failed: bool = False, unused: bool = False) -> None:
        seconds = time.monotonic() - sent.began
        self._fleet.fleet.finish(sent.member, seconds, failed=failed, unused=unused)


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
