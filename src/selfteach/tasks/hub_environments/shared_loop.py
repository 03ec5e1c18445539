"""Runs the coroutines of an environment of `verifiers` on one event loop, which it may block.

Connections of an environment belong to the loop that opened them, so all episodes share one. What is
not async would hold all of them up: tools run in threads, and a loop that something else blocks beyond
a deadline is left to itself, and another one takes its place.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import inspect
import logging
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any, TypeVar

from selfteach.runtime.event_loop import EventLoop

log = logging.getLogger(__name__)
T = TypeVar("T")
PATIENCE_S = 1.0
"""Seconds that a loop has to run a coroutine that does nothing."""
RAISED: contextvars.ContextVar[list[str] | None] = contextvars.ContextVar("raised", default=None)
"""Collects the names of tools that raise while one turn is replied to."""


class SharedLoop:
    """Runs coroutines from any thread, and waits for them."""

    def __init__(self, label: str, deadline_s: float) -> None:
        self._label, self._deadline_s = label, deadline_s
        self._loop, self._lock = EventLoop(), threading.Lock()
        self._running: dict[Future[Any], float] = {}

    def start(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Start a coroutine; a loop that has been blocked beyond a deadline is replaced before."""
        with self._lock:
            now = time.monotonic()
            deadlines = list(self._running.values())  # a copy: ended calls remove theirs meanwhile
            if any(deadline < now for deadline in deadlines):
                self._replace_if_blocked()
            future = self._loop.start(work)
            self._running[future] = now + self._deadline_s
        future.add_done_callback(lambda done: self._running.pop(done, None))
        return future

    def _replace_if_blocked(self) -> None:
        try:
            self._loop.start(asyncio.sleep(0)).result(PATIENCE_S)
        except FutureTimeout:
            log.warning("%s: its code blocks the event loop of all episodes", self._label)
            self._loop = EventLoop()
            self._running.clear()


def in_thread(tool: Callable[..., Any]) -> Callable[..., Any]:
    """Return an async function that calls a tool, in a thread of its own unless it is async.

    A thread that hangs ends with the process. What a tool raises is counted in `RAISED`.
    """

    @functools.wraps(tool)
    async def called(*args: Any, **kwargs: Any) -> Any:
        try:
            if inspect.iscoroutinefunction(tool):
                return await tool(*args, **kwargs)
            result = await _threaded(functools.partial(tool, *args, **kwargs))
            return await result if inspect.isawaitable(result) else result
        except Exception:
            raised = RAISED.get()
            if raised is not None:
                raised.append(getattr(tool, "__name__", type(tool).__name__))
            raise

    return called


async def _threaded(call: Callable[[], T]) -> T:
    future: Future[T] = Future()
    context = contextvars.copy_context()

    def run() -> None:
        try:
            result = context.run(call)
        except BaseException as error:
            outcome = functools.partial(future.set_exception, _plain(error))
        else:
            outcome = functools.partial(future.set_result, result)
        if future.set_running_or_notify_cancel():
            outcome()

    threading.Thread(target=run, name="tool", daemon=True).start()
    return await asyncio.wrap_future(future)


def _plain(error: BaseException) -> Exception:
    """Return an error that ends a call and not the loop: a tool may call sys.exit."""
    if isinstance(error, Exception) and not isinstance(error, StopIteration):
        return error
    return RuntimeError(f"{type(error).__name__}: {error}")
