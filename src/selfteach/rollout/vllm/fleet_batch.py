"""Samples one batch of requests with a fleet: each counts once, whatever members do."""

from __future__ import annotations

import time
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from typing import Protocol

from selfteach.errors import EngineError
from selfteach.rollout.vllm import synced_backend
from selfteach.rollout.vllm.synced_server import SyncedServer
from selfteach.rollout.vllm.vllm_engine import Completion, CompletionRequest, EngineUnavailable
from selfteach.runtime.dispatcher import Dispatcher, prefix_blocks

BLOCK_TOKENS = 64
"""Tokens of a prompt that are compared at a time to find who has its beginning cached."""
NAP_S = 0.25
"""Longest wait for replies before a look at which members are back."""


class SampledFleet(Protocol):
    """Is what a batch needs of a fleet."""

    @property
    def servers(self) -> Sequence[SyncedServer]:
        """Return all members."""
        ...

    @property
    def fleet(self) -> Dispatcher:
        """Return who is available."""
        ...

    @property
    def hedge_after(self) -> float | None:
        """Return after how many times the median a request is sent to a second member."""
        ...

    def drop(self, index: int, error: Exception) -> None:
        """Take a member out after an error."""
        ...

    def nobody(self) -> EngineUnavailable | EngineError:
        """Return the error of a fleet without an available member."""
        ...


@dataclass(frozen=True, slots=True)
class SentRequest:
    """Describes a request in flight."""

    member: int
    index: int
    began: float


class FleetBatch:
    """Samples one batch of requests: sends each to a member, and again if that one fails."""

    def __init__(self, fleet: SampledFleet, requests: Sequence[CompletionRequest]) -> None:
        self._fleet, self._requests = fleet, requests
        self._waiting = deque(range(len(requests)))
        self._running: dict[Future[Completion], SentRequest] = {}
        self._unchecked: defaultdict[int, list[tuple[int, Completion]]] = defaultdict(list)
        self._checks: dict[Future[str | None], tuple[int, list[tuple[int, Completion]]]] = {}
        self._checked_at: defaultdict[int, float] = defaultdict(time.monotonic)
        self._failures: Counter[int] = Counter()
        blocks = {ids: prefix_blocks(ids, BLOCK_TOKENS) for ids in {r.prompt_ids for r in requests}}
        self._prefixes = [blocks[request.prompt_ids] for request in requests]
        for prefix in blocks.values():
            fleet.fleet.expect(prefix)

    def completions(self) -> Iterator[tuple[int, Completion]]:
        """Yield (index of the request, completion) after the label was seen behind it.

        Raises `EngineUnavailable` or `EngineError` if no member is available, or if a request has
        failed more often than there are members.
        """
        try:
            while self._waiting or self._running or self._checks or any(self._unchecked.values()):
                self._send()
                self._hedge()
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
            for check in self._checks:
                check.cancel()
            self._cancel(self._running)

    def _send(self) -> None:
        """Send as many waiting requests as members may take."""
        while self._waiting:
            waiting = ((self._prefixes[index], ()) for index in self._waiting)
            assigned = self._fleet.fleet.assign_one(waiting)
            if assigned is None:
                return
            position, member = assigned
            index = self._waiting[position]
            del self._waiting[position]
            self._start(index, member)

    def _hedge(self) -> None:
        """Send requests that take long to a second member, when none waits for its first."""
        multiple, median = self._fleet.hedge_after, self._fleet.fleet.median_seconds
        if self._waiting or multiple is None or median is None:
            return
        now, copies = time.monotonic(), Counter(sent.index for sent in self._running.values())
        for sent in list(self._running.values()):
            if copies[sent.index] == 1 and now - sent.began > multiple * median:
                prefix = self._prefixes[sent.index]
                member = self._fleet.fleet.assign(prefix, {sent.member}, hedge=True)
                if member is None:
                    return
                self._start(sent.index, member)

    def _start(self, index: int, member: int) -> None:
        future = self._fleet.servers[member].start_completion(self._requests[index])
        self._running[future] = SentRequest(member, index, time.monotonic())

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
        self._cancel([f for f, other in self._running.items() if other.index == sent.index])

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
        lost += self._cancel([f for f, sent in self._running.items() if sent.member == member])
        hedged = {
            sent.index for sent in self._running.values()
        }  # their other copy is still running
        self._waiting.extendleft(sorted(set(lost) - hedged, reverse=True))

    def _cancel(self, futures: Iterable[Future[Completion]]) -> list[int]:
        """Cancel requests in flight; return which they were."""
        cancelled = []
        for future in list(futures):
            future.cancel()
            cancelled.append(self._running.pop(future))
            self._finish(cancelled[-1], unused=True)
        return [sent.index for sent in cancelled]

    def _finish(self, sent: SentRequest, *, failed: bool = False, unused: bool = False) -> None:
        seconds = time.monotonic() - sent.began
        self._fleet.fleet.finish(sent.member, seconds, failed=failed, unused=unused)
