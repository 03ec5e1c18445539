"""Call code of others side by side, each call with a deadline, whatever it does."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

from selfteach.runtime.part_calls import place_of

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class CallFailure:
    """Describes a call without a result."""

    kind: Literal["timeout", "failed"]
    detail: str
    """What it raised and where, or how long it took; one line."""


@dataclass(frozen=True, slots=True)
class _Started(Generic[Result]):
    index: int
    deadline: float


def call_all(
    calls: Sequence[Callable[[], Result]], *, deadline_s: float, threads: int
) -> list[Result | CallFailure]:
    """Return the results of calls in order, at most ``threads`` at a time; the reason where one fails.

    A call that takes longer than ``deadline_s`` is left to itself in a daemon thread, which neither
    delays the others nor the end of the process: Python cannot end a thread.
    """
    results: dict[int, Result | CallFailure] = {}
    waiting, running = deque(range(len(calls))), dict[int, float]()
    finished: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
    while len(results) < len(calls):
        while waiting and len(running) < max(1, threads):
            index = waiting.popleft()
            running[index] = time.monotonic() + deadline_s
            target = _reporting(calls[index], index, finished)
            threading.Thread(target=target, name="environment", daemon=True).start()
        try:
            left = min(running.values()) - time.monotonic()
            index, result = finished.get(timeout=max(0.0, left))
        except queue.Empty:
            now = time.monotonic()
            for index in [i for i, deadline in running.items() if deadline <= now]:
                del running[index]
                results[index] = CallFailure("timeout", f"no reply within {deadline_s:g} s")
            continue
        if running.pop(index, None) is not None:  # else it came after its deadline
            results[index] = result
    return [results[index] for index in range(len(calls))]


def _reporting(
    call: Callable[[], Any], index: int, finished: queue.SimpleQueue[tuple[int, Any]]
) -> Callable[[], None]:
    """Return a function that puts a call's result, or what it raised, into a queue."""

    def report() -> None:
        try:
            result = call()
        except BaseException as error:  # sys.exit ends a thread without a word
            text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            result = CallFailure("failed", f"{text}{place_of(error)}")
        finished.put((index, result))

    return report
