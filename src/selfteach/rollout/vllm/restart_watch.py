"""Looks after servers between batches, where rank 0 alone can give a restarted one its weights."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

WATCH_INTERVAL_S = 1.0
"""Between looks at the label of each server."""


def watch(owner: T, look: Callable[[T], None]) -> None:
    """Call a function again and again in a thread of its own, until ``owner`` is used no more."""
    work = (weakref.ref(owner), look)
    threading.Thread(target=_watch, args=work, name="restart-watch", daemon=True).start()


def _watch(owner: weakref.ReferenceType[T], look: Callable[[T], None]) -> None:
    while True:
        time.sleep(WATCH_INTERVAL_S)
        held = owner()
        if held is None:
            return
        look(held)
        del held
