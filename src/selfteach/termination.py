"""SIGTERM, from a scheduler that wants its machine back: heard at once, obeyed where it does no harm.

While weights change, or are swapped for a teacher's, an exception would leave them half of one kind
and half of another. So the signal ends the process only in stretches that are marked as safe: waiting,
sampling, evaluating. Elsewhere it is remembered until the next of them.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from selfteach.errors import Terminated

STATUS = 143
"""Exit status of a run that was ended by SIGTERM and has saved what it had learned: 128 + 15."""


class Termination:
    """Whether SIGTERM has come, and whether this is a moment to obey."""

    def __init__(self) -> None:
        self._asked = self._safe = False

    @contextmanager
    def safe(self) -> Iterator[None]:
        """A stretch that may end anywhere: raises `Terminated` in it, or at its beginning if the
        signal has come before."""
        self._safe = True
        try:
            if self._asked:
                raise Terminated
            yield
        finally:
            self._safe = False

    def _heard(self, *_: object) -> None:
        self._asked = True
        if self._safe:
            raise Terminated


@contextmanager
def listening() -> Iterator[Termination]:
    """Hears SIGTERM for the length of a block; deaf outside of a process's main thread."""
    termination = Termination()
    if threading.current_thread() is not threading.main_thread():
        yield termination
        return
    before = signal.signal(signal.SIGTERM, termination._heard)
    try:
        yield termination
    finally:
        signal.signal(signal.SIGTERM, before)
