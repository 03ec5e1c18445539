"""Requests replies from OpenAI-compatible servers: vLLM, SGLang, llama.cpp, Ollama, hosted APIs.

Several servers of the same model are a fleet (`critic.base_urls`). Which of them replies changes no
result: requests, the reply cache's keys and retries of useless replies are those of one server.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from selfteach.config.served_model import ServedModelConfig
from selfteach.errors import CriticError
from selfteach.feedback.critics.chat_model import NoReply, OnReply, Reply, Request
from selfteach.feedback.critics.endpoint_member import EndpointMember, MemberFailure
from selfteach.runtime.dispatcher import Dispatcher, prefix_blocks

log = logging.getLogger("selfteach")

BLOCK_LETTERS = 256
"""Letters of a prompt that are compared at a time to find who has its beginning cached."""
PROBE_INTERVAL_S = 1.0
"""Before the first probe of a member that was taken out; each further pause is twice the one before."""
MAX_PROBE_INTERVAL_S = 30.0
PAUSE_S = 0.5
"""Before a request is repeated that failed at two members, or found them busy; doubled each time."""
MAX_PAUSE_S = 8.0
MIN_HEDGE_S = 0.05
"""A request is not hedged earlier, however fast the median."""
LOST_HEDGES = 3
"""Requests in a row in which a second member was faster, before the first is taken out."""


@dataclass(eq=False, slots=True)
class Waiting:
    """Holds a request that waits for a member."""

    prefix: Sequence[int]
    avoid: set[int]
    member: asyncio.Future[int | None]


Tasks = dict[int, asyncio.Task[Reply | NoReply]]
"""Copies of one request by member."""


class EndpointModel:
    """Requests replies from a served chat model, at one address or several.

    Raises `CriticError` if an API key is missing.
    """

    remote = True

    def __init__(self, config: ServedModelConfig) -> None:
        self._config, alone = config, len(config.members) == 1
        # One server's failures are retried by its HTTP client; a fleet's requests go elsewhere.
        retries = config.http_retries if alone else 0
        self._members = [EndpointMember(one, retries=retries) for one in config.members]
        self._attempts = 1 if alone else max(len(self._members), 1 + config.http_retries)
        names = [one.address for one in config.members]
        self.fleet = Dispatcher(names, config.concurrency)
        self._unsaved = asyncio.Semaphore(config.concurrency * len(names))
        self._waiting: deque[Waiting] = deque()
        self._sending_soon = False
        self._giving_up: asyncio.TimerHandle | None = None
        self._lost_hedges, self._relapses = [0] * len(names), [0] * len(names)
        self._unfit: dict[int, str] = {}
        self._probes: set[asyncio.Task[None]] = set()

    @property
    def identity(self) -> str:
        """Return model name and request parameters that change replies; no address."""
        extra = json.dumps(self._config.request_extras, sort_keys=True)
        names = self._config.parameters
        left_out = [name for name in type(names).model_fields if getattr(names, name) is False]
        return f"endpoint:{self._config.model}:{extra}" + (f":-{left_out}" if left_out else "")

    def complete(self, requests: Sequence[Request], on_reply: OnReply) -> list[Reply | NoReply]:
        """Send all requests concurrently, within the limits; may be called from any thread.

        If one raises, those in flight end and their replies are stored before the error is raised.
        """
        return self._members[0].api.call(self._complete(requests, on_reply))

    async def _complete(
        self, requests: Sequence[Request], on_reply: OnReply
    ) -> list[Reply | NoReply]:
        errors: list[BaseException] = []

        async def one(index: int, request: Request) -> Reply | NoReply:
            try:
                return await self._request(request, partial(on_reply, index), errors)
            except Exception as error:
                errors.append(error)
                return NoReply("an error")

        replies = await asyncio.gather(*(one(i, r) for i, r in enumerate(requests)))
        if errors:
            raise errors[0]
        return list(replies)

    async def _request(
        self, request: Request, save: Callable[[Reply], None], errors: Sequence[BaseException]
    ) -> Reply | NoReply:
        """Send a request to one member after the other until there is a reply, and save that.

        It is not sent if another one has had an error before its turn. Raises `CriticError` for what
        holds for every request at every member.
        """
        text = "\0".join(f"{role}\0{content}" for role, content in request.messages)
        prefix, failed_at = prefix_blocks(text, BLOCK_LETTERS), set[int]()
        self.fleet.expect(prefix)
        for attempt in range(self._attempts):
            member = await self._free_member(prefix, failed_at)
            if member is None:
                return NoReply(self._nobody())
            if errors:
                self._finish(member, 0.0, unused=True)
                return NoReply("not sent, since another request failed")
            try:
                async with self._unsaved:  # on disk before the next request is sent
                    reply = await self._hedged(request, prefix, member)
                    if isinstance(reply, Reply):
                        await asyncio.to_thread(save, reply)
                    return reply
            except MemberFailure as error:
                if attempt + 1 == self._attempts:
                    self._after_failure(member, error)
                    if (unfit := self._all_unfit()) is not None:
                        raise unfit from None
                    return NoReply(error.reason)
                pause_s = min(PAUSE_S * 2**attempt, MAX_PAUSE_S)
                if error.kind == "busy":
                    rest_s = error.retry_after_s or pause_s
                    self.fleet.rest(member, rest_s)
                    asyncio.get_running_loop().call_later(rest_s, self._send_waiting)
                elif failed_at - {member} and error.kind in ("slow", "error"):
                    # It has failed elsewhere too, and may be the cause: the member stays.
                    self._send_soon()
                    await asyncio.sleep(pause_s)
                else:
                    failed_at.add(member)
                    self._after_failure(member, error)
                self._send_soon()
        raise AssertionError("unreachable")

    def _after_failure(self, member: int, error: MemberFailure) -> None:
        """Take a member of a fleet out, unless it is only busy."""
        if error.kind == "unfit":
            self._unfit[member] = error.reason
        if len(self._members) > 1 and error.kind != "busy":
            self._take_out(member, error.reason)
        self._send_soon()

    def _all_unfit(self) -> CriticError | None:
        """Return the error of a fleet of which no member can take any request of this recipe."""
        if len(self._unfit) < len(self._members):
            return None
        return CriticError("; ".join(self._unfit.values()))

    async def _free_member(self, prefix: Sequence[int], avoid: set[int]) -> int | None:
        """Wait for a member that may take a request; None if none is available for too long.

        Raises `CriticError` if none can take any request of this recipe.
        """
        loop = asyncio.get_running_loop()
        waiting = Waiting(prefix, avoid, loop.create_future())
        self._waiting.append(waiting)
        self._send_soon()
        try:
            return await waiting.member
        except asyncio.CancelledError:
            if waiting in self._waiting:
                self._waiting.remove(waiting)
            elif waiting.member.done() and not waiting.member.cancelled():
                self._finish(waiting.member.result(), 0.0, unused=True)
            raise

    def _send_soon(self) -> None:
        """Give members to requests when all of a batch wait, so that equal prompts share one."""
        if not self._sending_soon:
            self._sending_soon = True
            asyncio.get_running_loop().call_soon(self._send_waiting)

    def _send_waiting(self) -> None:
        """Give members to requests that wait for one."""
        self._sending_soon = False
        self._waiting = deque(one for one in self._waiting if not one.member.done())
        if self._waiting and not self.fleet.any_available:
            if (unfit := self._all_unfit()) is not None:
                for waiting in self._waiting:
                    waiting.member.set_exception(unfit)
                self._waiting.clear()
            elif self._giving_up is None:
                loop = asyncio.get_running_loop()
                self._giving_up = loop.call_later(self._config.patience_seconds, self._give_up)
            return
        while self._waiting:
            assigned = self.fleet.assign_one((one.prefix, one.avoid) for one in self._waiting)
            if assigned is None:
                return
            position, member = assigned
            self._waiting[position].member.set_result(member)
            del self._waiting[position]

    def _give_up(self) -> None:
        """End the requests that wait: no member was available for too long."""
        self._giving_up = None
        while self._waiting:
            waiting = self._waiting.popleft()
            if not waiting.member.done():
                waiting.member.set_result(None)

    async def _hedged(self, request: Request, prefix: Sequence[int], first: int) -> Reply | NoReply:
        """Send a request to a member, and if it is slow to a second one; return the first reply.

        Raises `MemberFailure` if the first has failed, and the second too.
        """
        if (wait_s := self._hedge_after()) is None:
            return await self._at(first, request)
        admitted = asyncio.Event()
        tasks = {first: asyncio.create_task(self._at(first, request, admitted))}
        limits = asyncio.create_task(admitted.wait())
        try:
            await asyncio.wait((tasks[first], limits), return_when=asyncio.FIRST_COMPLETED)
            await asyncio.wait((tasks[first],), timeout=wait_s)
            if not tasks[first].done():
                second = self.fleet.assign(prefix, {first}, hedge=True)
                if second is not None:
                    tasks[second] = asyncio.create_task(self._at(second, request))
            return await self._first_reply(tasks, first)
        finally:
            for task in (limits, *tasks.values()):
                task.cancel()

    async def _first_reply(self, tasks: Tasks, first: int) -> Reply | NoReply:
        """Return the first reply, with the tokens of the request's other copy."""
        running, failures = dict(tasks), dict[int, MemberFailure]()
        while running:
            await asyncio.wait(running.values(), return_when=asyncio.FIRST_COMPLETED)
            for member in [i for i, task in running.items() if task.done()]:
                task = running.pop(member)
                if isinstance(error := task.exception(), MemberFailure):
                    failures[member] = error
                elif isinstance(reply := task.result(), Reply):
                    for other, error in failures.items():
                        self._after_failure(other, error)
                    self._count_lost_hedge(first, lost=member != first)
                    return with_hedge(reply, [tasks[i] for i in tasks if i != member])
        for other in failures.keys() - {first}:  # the first one's is raised
            self._after_failure(other, failures[other])
        return tasks[first].result()

    def _count_lost_hedge(self, member: int, *, lost: bool) -> None:
        """Take a member out that was slower than a second one several times in a row."""
        self._lost_hedges[member] = self._lost_hedges[member] + 1 if lost else 0
        if self._lost_hedges[member] >= LOST_HEDGES:
            self._lost_hedges[member] = 0
            self._take_out(member, f"{LOST_HEDGES} requests in a row were faster elsewhere")

    def _hedge_after(self) -> float | None:
        """Return the seconds after which a request is sent to a second member; None for never."""
        multiple, median = self._config.hedge_after, self.fleet.median_seconds
        if multiple is None or median is None:
            return None
        return max(multiple * median, MIN_HEDGE_S)

    async def _at(
        self, member: int, request: Request, admitted: asyncio.Event | None = None
    ) -> Reply | NoReply:
        """Send a request to a member that was assigned to it. Raises `MemberFailure`."""
        began, failed, unused = time.monotonic(), False, True
        try:
            reserved = await self._members[member].admit(request)
            began = time.monotonic()
            if admitted is not None:
                admitted.set()
            reply = await self._members[member].reply(request, reserved)
            unused = not isinstance(reply, Reply)
            self._relapses[member] *= unused
            self._unfit.pop(member, None)
            return reply
        except MemberFailure:
            failed = True
            raise
        finally:
            self._finish(member, time.monotonic() - began, failed=failed, unused=unused)

    def _finish(
        self, member: int | None, seconds: float, *, failed: bool = False, unused: bool = False
    ) -> None:
        """Note that a member has room for another request."""
        if member is not None:
            self.fleet.finish(member, seconds, failed=failed, unused=unused)
            if not failed:  # else when it is decided whether the member stays
                self._send_waiting()

    def _take_out(self, member: int, reason: str) -> None:
        """Send a member nothing until a probe of it succeeds."""
        if self.fleet.take_out(member, reason):
            self._send_soon()
            name = f"{self._config.label}: {self.fleet.name(member)}"
            log.warning("%s is taken out until it replies again (%s)", name, reason)
            pause_s = min(PROBE_INTERVAL_S * 2 ** self._relapses[member], MAX_PROBE_INTERVAL_S)
            self._relapses[member] += 1
            probe = asyncio.create_task(_probed(weakref.ref(self), member, pause_s))
            self._probes.add(probe)
            probe.add_done_callback(self._probes.discard)

    async def probe(self, member: int) -> bool:
        """Put a member back if it replies; return True if it did."""
        try:
            await self._members[member].probe()
        except MemberFailure as error:
            if error.kind == "unfit":
                self._unfit[member] = error.reason
            return False
        self._unfit.pop(member, None)
        self.fleet.put_back(member)
        if self._giving_up is not None:
            self._giving_up.cancel()
            self._giving_up = None
        self._send_waiting()
        log.warning("%s: %s is back", self._config.label, self.fleet.name(member))
        return True

    def _nobody(self) -> str:
        reasons = [f"{self.fleet.name(i)}: {why}" for i, why in self.fleet.out.items()]
        return f"no server for {self._config.patience_seconds:g} s ({'; '.join(reasons)})"


async def _probed(model: weakref.ReferenceType[EndpointModel], member: int, pause_s: float) -> None:
    """Probe a member until it is back, or the model is used no more."""
    while True:
        await asyncio.sleep(pause_s)
        held = model()
        if held is None or await held.probe(member):
            return
        del held
        pause_s = min(2 * pause_s, MAX_PROBE_INTERVAL_S)


def with_hedge(reply: Reply, others: Sequence[asyncio.Task[Reply | NoReply]]) -> Reply:
    """Return a reply with the tokens of other copies of its request.

    What a copy that is cut off has cost is not reported by servers: it counts as much as the reply,
    which it had not reached. One that has failed costs nothing.
    """
    for other in others:
        if not other.done():
            copy: Reply | NoReply = reply
        elif other.exception() is None:
            copy = other.result()
        else:
            continue
        if isinstance(copy, Reply):
            reply = replace(
                reply,
                hedge_prompt_tokens=copy.prompt_tokens,
                hedge_completion_tokens=copy.completion_tokens,
            )
    return reply
