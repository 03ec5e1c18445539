"""A batch of a fleet of samplers: each request is completed once, whatever members do."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from selfteach.errors import EngineError
from selfteach.rollout.vllm.vllm_engine import Completion, CompletionRequest, EngineUnavailable
from selfteach.rollout.vllm.vllm_fleet import FleetBatch
from selfteach.runtime.dispatcher import Dispatcher


def resolved(result: object) -> Future[Any]:
    future: Future[Any] = Future()
    if isinstance(result, Exception):
        future.set_exception(result)
    else:
        future.set_result(result)
    return future


class ScriptedServer:
    """Completes a request with its seed, or fails; its label changes now and then."""

    def __init__(self, faults: list[str]) -> None:
        self.faults, self.sent = faults, list[int]()

    def _next(self) -> str:
        return self.faults.pop(0) if self.faults else "works"

    def start_completion(self, request: CompletionRequest) -> Future[Completion]:
        self.sent.append(request.seed)
        match self._next():
            case "fails":
                return resolved(EngineUnavailable("down"))
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
    """Takes members out and puts the one that is out for longest back when no other is left."""

    def __init__(self, servers: list[ScriptedServer], capacity: int) -> None:
        self.servers = servers
        self.fleet = Dispatcher([str(i) for i in range(len(servers))], capacity)
        self.dropped: list[int] = []

    def drop(self, index: int, error: Exception) -> None:
        if self.fleet.take_out(index, str(error)):
            self.dropped.append(index)
        if not self.fleet.any_available:
            self.fleet.put_back(self.dropped.pop(0))

    def nobody(self) -> Exception:
        return AssertionError("a member is always left")


FAULTS = st.lists(st.sampled_from(["works", "works", "works", "fails", "stale"]), max_size=12)


@settings(max_examples=150, deadline=None)
@given(
    faults=st.lists(FAULTS, min_size=1, max_size=4),
    capacity=st.integers(1, 3),
    prompts=st.lists(st.integers(0, 3), max_size=12),
)
def test_no_request_is_lost_or_doubled(
    faults: list[list[str]], capacity: int, prompts: list[int]
) -> None:
    servers = [ScriptedServer(list(script)) for script in faults]
    fleet = ScriptedFleet(servers, capacity)
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
