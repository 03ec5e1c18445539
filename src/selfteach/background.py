"""Calls that are made now and waited for later."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import ParamSpec, Protocol, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


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

    Leaving waits for what has begun and forgets what has not.
    """
    if threads == 0:
        yield partial
        return
    with ThreadPoolExecutor(threads) as pool:

        def soon(function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Callable[[], T]:
            return pool.submit(function, *args, **kwargs).result

        try:
            yield soon
        finally:
            pool.shutdown(cancel_futures=True)
