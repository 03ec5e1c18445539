"""Run calls in background threads, and measure when they were running."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import ParamSpec, Protocol, TypeVar, runtime_checkable

from selfteach.errors import Terminated

P = ParamSpec("P")
T = TypeVar("T")


@runtime_checkable
class Submit(Protocol):
    """Takes a call and returns a function that waits for its result (or raises what it raised)."""

    def __call__(
        self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs
    ) -> Callable[[], T]:
        """Start the call if a thread is free; otherwise it starts when its result is requested."""
        ...


@contextmanager
def executor(threads: int) -> Iterator[Submit]:
    """Yield a `Submit` with so many threads; with none, a call runs when its result is requested.

    Leaving the block waits for calls that have started and cancels the others; when the process is to
    end (`Terminated`, KeyboardInterrupt) it does not wait.
    """
    if threads == 0:
        yield partial
        return
    pool = ThreadPoolExecutor(threads)

    def submit(function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Callable[[], T]:
        return pool.submit(function, *args, **kwargs).result

    wait = True
    try:
        yield submit
    except (Terminated, KeyboardInterrupt):
        wait = False
        raise
    finally:
        pool.shutdown(wait=wait, cancel_futures=True)


def submit_inline(
    function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs
) -> Callable[[], T]:
    """Run the call now, in this thread; implements `Submit`."""
    result = function(*args, **kwargs)
    return lambda: result


Span = tuple[float, float]
"""When a call began and ended, in seconds of a monotonic clock."""

_active_spans: ContextVar[list[Span] | None] = ContextVar("active_spans", default=None)


def timed_call(
    function: Callable[P, T], spans: list[Span], /, *args: P.args, **kwargs: P.kwargs
) -> T:
    """Call a function and append the span of the call to ``spans`` (safe from any thread).

    If the call opens `active_span` blocks, their spans are appended instead: outside it only waited.
    """
    active_spans: list[Span] = []
    began, outer = time.monotonic(), _active_spans.set(active_spans)
    try:
        return function(*args, **kwargs)
    finally:
        _active_spans.reset(outer)
        spans.extend(active_spans or [(began, time.monotonic())])


@contextmanager
def active_span() -> Iterator[None]:
    """Measure a block of a `timed_call` in which work is done for it, in any thread."""
    spans, began = _active_spans.get(), time.monotonic()
    try:
        yield
    finally:
        if spans is not None:
            spans.append((began, time.monotonic()))


def covered_seconds(spans: Iterable[Span]) -> float:
    """Return the seconds in which at least one of the spans was in progress."""
    seconds, until = 0.0, float("-inf")
    for began, ended in sorted(spans):
        seconds += max(0.0, ended - max(began, until))
        until = max(until, ended)
    return seconds
