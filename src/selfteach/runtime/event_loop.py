"""Runs coroutines on one event loop in a thread of its own, from any other thread."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


class EventLoop:
    """Holds an event loop whose thread starts with the first coroutine and ends with this object.

    All coroutines share it, so that a connection that one of them opened serves the others.
    """

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._starting = threading.Lock()

    def start(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Start a coroutine; the future returned has its result, and cancels it."""
        with self._starting:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                run = (self._loop,)
                threading.Thread(
                    target=run_until_stopped, args=run, name="coroutines", daemon=True
                ).start()
                stop = weakref.finalize(self, self._loop.call_soon_threadsafe, self._loop.stop)
                stop.atexit = False
        return asyncio.run_coroutine_threadsafe(work, self._loop)


def run_until_stopped(loop: asyncio.AbstractEventLoop) -> None:
    """Run a thread's event loop until it is stopped, then once more to run the callbacks of closing."""
    loop.run_forever()
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
