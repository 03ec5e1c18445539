"""Calls that are made now and waited for later, and how long they took."""

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
class Later(Protocol):
    """Takes a call, gives back what waits for its result (or raises what it raised)."""

    def __call__(
        self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs
    ) -> Callable[[], T]:
        """Begin the call if there is a thread for it; else it begins when it is waited for."""
        ...


@contextmanager
def later(threads: int) -> Iterator[Later]:
    """Calls in so many threads beside this one; with none, each runs when its result is asked for.

    Leaving waits for what has begun and forgets what has not; when the process is to end (`Terminated`)
    it does not wait.
    """
    if threads == 0:
        yield partial
        return
    pool = ThreadPoolExecutor(threads)

    def soon(function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Callable[[], T]:
        return pool.submit(function, *args, **kwargs).result

    waits = True
    try:
        yield soon
    except Terminated:
        waits = False
        raise
    finally:
        pool.shutdown(wait=waits, cancel_futures=True)


def at_once(function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Callable[[], T]:
    """A `Later` that makes the call here and now."""
    result = function(*args, **kwargs)
    return lambda: result


Span = tuple[float, float]
"""When something began and ended, in seconds of a clock that only goes forward."""


_at_work: ContextVar[list[Span] | None] = ContextVar("at_work", default=None)


def timed(function: Callable[P, T], spans: list[Span], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """A call whose span is added to a list (which is safe from any thread).

    If the call says when it is `at_work`, those spans are added instead: the rest was waiting.
    """
    own: list[Span] = []
    began, outer = time.monotonic(), _at_work.set(own)
    try:
        return function(*args, **kwargs)
    finally:
        _at_work.reset(outer)
        spans.extend(own or [(began, time.monotonic())])


@contextmanager
def at_work() -> Iterator[None]:
    """A stretch of a `timed` call in which something is done for it, in whatever thread."""
    spans, began = _at_work.get(), time.monotonic()
    try:
        yield
    finally:
        if spans is not None:
            spans.append((began, time.monotonic()))


def covered(spans: Iterable[Span]) -> float:
    """Seconds in which at least one of the spans was under way."""
    seconds, until = 0.0, float("-inf")
    for began, ended in sorted(spans):
        seconds += max(0.0, ended - max(began, until))
        until = max(until, ended)
    return seconds
