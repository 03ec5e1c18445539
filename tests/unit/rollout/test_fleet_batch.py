"""A batch of a fleet of samplers: each request is completed once, whatever members do."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selfteach.errors import EngineError
from selfteach.rollout.vllm import fleet_batch
from selfteach.rollout.vllm.fleet_batch import FleetBatch
from selfteach.rollout.vllm.vllm_engine import Completion, CompletionRequest, EngineUnavailable
from selfteach.runtime.dispatcher import Dispatcher


@pytest.fixture(autouse=True, scope="module")
def _short_naps() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fleet_batch, "NAP_S", 0.001)
        yield


def resolved(result: object) -> Future[Any]:
    future: Future[Any] = Future()
    if isinstance(result, Exception):
        future.set_exception(result)
    else:
        future.set_result(result)
    return future


class ScriptedServer:
    """Completes a request with its seed, or fails; its label changes now and then."""

    def __init__(self, faults: list[str], *, hangs: bool = False) -> None:
        self.faults, self.hangs, self.sent = faults, hangs, list[int]()

    def _next(self) -> str:
        return self.faults.pop(0) if self.faults else "works"

    def start_completion(self, request: CompletionRequest) -> Future[Completion]:
        self.sent.append(request.seed)
        match self._next():
            case "fails":
                return resolved(EngineUnavailable("down"))
            case "hangs" if self.hangs:
                return Future()
            case _:
                return resolved(Completion((request.seed,), (-1.0,)))

    def start_label(self) -> Future[str | None]:
        return resolved(self._next())

    def require_unchanged(self, label: str | None) -> None:
        if label == "stale":
            raise EngineError("stale")
        if label == "fails":
            raise EngineUnavailable("it was restarted")


class ScriptedFleet:
    """Takes members out and puts the one that is out for longest back when no other is left.

    One that hedges has a median, and puts members back at once: a request that hangs needs another.
    """

    def __init__(self, servers: list[ScriptedServer], capacity: int, *, hedges: bool) -> None:
        self.servers, self.hedge_after = servers, 2.0 if hedges else None
        self.fleet = Dispatcher([str(i) for i in range(len(servers))], capacity)
        self.dropped: list[int] = []
        for _ in range(5 * hedges):
            self.fleet.assign()
            self.fleet.finish(0, 0.0)
        self.fleet.read_counts()

    def drop(self, index: int, error: Exception) -> None:
        if self.fleet.take_out(index, str(error)):
            self.dropped.append(index)
        if self.hedge_after or not self.fleet.any_available:
            self.fleet.put_back(self.dropped.pop(0))

    def nobody(self) -> Exception:
        return AssertionError("a member is always left")


FAULTS = st.lists(
    st.sampled_from(["works", "works", "works", "fails", "stale", "hangs"]), max_size=12
)


@settings(max_examples=150, deadline=None)
@given(
    hedges=st.booleans(),
    faults=st.lists(FAULTS, min_size=2, max_size=4),
    capacity=st.integers(1, 3),
    prompts=st.lists(st.integers(0, 3), max_size=12),
)
def test_no_request_is_lost_or_doubled(
    hedges: bool, faults: list[list[str]], capacity: int, prompts: list[int]
) -> None:
    servers = [
        ScriptedServer(list(script), hangs=hedges and not number)
        for number, script in enumerate(faults)
    ]
    fleet = ScriptedFleet(servers, capacity, hedges=hedges)
    requests = [CompletionRequest((p,), i, 4, 1.0, ()) for i, p in enumerate(prompts)]
    received: dict[int, Completion] = {}
    for _ in range(
        100
    ):  # a request that fails too often ends a batch: the engine asks for the rest
        missing = [i for i in range(len(requests)) if i not in received]
        batch = FleetBatch(fleet, [requests[i] for i in missing])  # type: ignore[arg-type]
        try:
            for index, completion in batch.completions():
                assert missing[index] not in received
                received[missing[index]] = completion
            break
        except EngineUnavailable:
            continue
    assert {i: completion.ids for i, completion in received.items()} == {
        i: (i,) for i in range(len(requests))
    }
    assert sum(member.requests for member in fleet.fleet.read_counts()) == sum(
        len(server.sent) for server in servers
    )
    for member in range(len(servers)):
        fleet.fleet.put_back(member)
    free = [fleet.fleet.assign() for _ in range(capacity * len(servers))]
    assert None not in free  # nothing is left in flight
