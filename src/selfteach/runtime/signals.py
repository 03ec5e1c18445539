"""SIGTERM, from a scheduler that wants its machine back: heard at once, obeyed where it does no harm.

While weights change, or are swapped for a teacher's, an exception would leave them half of one kind
and half of another. So the signal ends the process only in stretches that are marked as safe: waiting,
sampling, evaluating. Elsewhere it is remembered until the next of them.

Many ranks must stop at the same step: there the signal is only heard (`Termination.asked`), and after
each step the ranks tell one another.
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

    def __init__(self, *, waits: bool = False) -> None:
        self.asked = False
        """True once SIGTERM has come."""
        self._waits, self._safe = waits, False

    @contextmanager
    def safe(self) -> Iterator[None]:
        """A stretch that may end anywhere: raises `Terminated` in it, or at its beginning if the
        signal has come before; one that waits raises nothing."""
        self._safe = not self._waits
        try:
            if self.asked and self._safe:
                raise Terminated
            yield
        finally:
            self._safe = False

    def _heard(self, *_: object) -> None:
        self.asked = True
        if self._safe:
            raise Terminated


@contextmanager
def listening(*, waits: bool = False) -> Iterator[Termination]:
    """Hears SIGTERM for the length of a block; deaf outside of a process's main thread.

    One that ``waits`` is asked whether the signal has come, and never interrupts.
    """
    termination = Termination(waits=waits)
    if threading.current_thread() is not threading.main_thread():
        yield termination
        return
    before = signal.signal(signal.SIGTERM, termination._heard)
    try:
        yield termination
    finally:
        signal.signal(signal.SIGTERM, before)
