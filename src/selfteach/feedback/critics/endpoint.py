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
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

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
NAP_S = 0.25
"""Longest sleep between looks for a free member."""
MIN_HEDGE_S = 0.05
"""A request is not hedged earlier, however fast the median."""
LOST_HEDGES = 3
"""Requests in a row in which a second member was faster, before the first is taken out."""

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
        self._slots = asyncio.Semaphore(config.concurrency * len(names))
        self._changed = asyncio.Event()
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
            async with self._slots:
                if errors:
                    return NoReply("not sent, since another request failed")
                try:
                    reply = await self._request(request)
                    if isinstance(reply, Reply):  # on disk before the next request is sent
                        await asyncio.to_thread(on_reply, index, reply)
                    return reply
                except Exception as error:
                    errors.append(error)
                    return NoReply("an error")

        replies = await asyncio.gather(*(one(i, r) for i, r in enumerate(requests)))
        if errors:
            raise errors[0]
        return list(replies)

    async def _request(self, request: Request) -> Reply | NoReply:
        """Send a request to one member after the other until there is a reply.

        Raises `CriticError` for what holds for every request at every member.
        """
        text = "\0".join(f"{role}\0{content}" for role, content in request.messages)
        prefix, failed_at = prefix_blocks(text, BLOCK_LETTERS), set[int]()
        for attempt in range(self._attempts):
            member = await self._free_member(prefix, failed_at)
            if member is None:
                return NoReply(self._nobody())
            try:
                return await self._hedged(request, prefix, member)
            except MemberFailure as error:
                if attempt + 1 == self._attempts:
                    self._after_failure(member, error)
                    self._raise_if_all_unfit()
                    return NoReply(error.reason)
                pause_s = min(PAUSE_S * 2**attempt, MAX_PAUSE_S)
                if error.kind == "busy":
                    self.fleet.rest(member, error.retry_after_s or pause_s)
                elif failed_at - {member} and error.kind in ("slow", "error"):
                    # It has failed elsewhere too, and may be the cause: the member stays.
                    await asyncio.sleep(pause_s)
                else:
                    failed_at.add(member)
                    self._after_failure(member, error)
        raise AssertionError("unreachable")

    def _after_failure(self, member: int, error: MemberFailure) -> None:
        """Take a member of a fleet out, unless it is only busy."""
        if error.kind == "unfit":
            self._unfit[member] = error.reason
        if len(self._members) > 1 and error.kind != "busy":
            self._take_out(member, error.reason)

    def _raise_if_all_unfit(self) -> None:
        """Raise `CriticError` if no member can take any request of this recipe."""
        if len(self._unfit) == len(self._members):
            raise CriticError("; ".join(self._unfit.values()))

    async def _free_member(self, prefix: Sequence[int], avoid: set[int]) -> int | None:
        """Wait for a member that may take a request; None if none is available for too long.

        Raises `CriticError` if none can take any request of this recipe.
        """
        deadline: float | None = None
        while (member := self.fleet.assign(prefix, avoid)) is None:
            if self.fleet.any_available:
                deadline = None
            else:
                self._raise_if_all_unfit()
                deadline = deadline or time.monotonic() + self._config.patience_seconds
                if time.monotonic() >= deadline:
                    return None
            with suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), NAP_S)
        return member

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
            self.fleet.finish(member, time.monotonic() - began, failed=failed, unused=unused)
            self._notify()

    def _take_out(self, member: int, reason: str) -> None:
        """Send a member nothing until a probe of it succeeds."""
        if self.fleet.take_out(member, reason):
            name = f"{self._config.role}: {self.fleet.name(member)}"
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
        self._notify()
        log.warning("%s: %s is back", self._config.role, self.fleet.name(member))
        return True

    def _notify(self) -> None:
        """Wake all requests that wait for a member."""
        self._changed.set()
        self._changed = asyncio.Event()

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
