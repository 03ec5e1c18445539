"""Handles SIGTERM, which a scheduler sends before it stops a job.

While weights change, or are swapped for a teacher's, an exception would leave a mixture of both. So the
signal ends the process only in blocks that are declared interruptible: waiting, sampling, evaluating.
Elsewhere it is remembered until the next such block.

Many ranks must stop at the same step: there the signal is only remembered (`Termination.requested`),
and after each step the ranks exchange it.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from selfteach.errors import Terminated

EXIT_STATUS = 143
"""Exit status of a run that was ended by SIGTERM and has saved its progress: 128 + 15."""


class Termination:
    """Remembers whether SIGTERM has arrived, and whether the process may end now."""

    def __init__(self, *, deferred: bool = False) -> None:
        self.requested = False
        """True once SIGTERM has arrived."""
        self._deferred, self._interruptible = deferred, False

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Let SIGTERM raise `Terminated` anywhere in a block, or at its start if it arrived before.

        Raises nothing if termination is deferred.
        """
        self._interruptible = not self._deferred
        try:
            if self.requested and self._interruptible:
                raise Terminated
            yield
        finally:
            self._interruptible = False

    def _on_signal(self, *_: object) -> None:
        self.requested = True
        if self._interruptible:
            raise Terminated


@contextmanager
def handle_sigterm(*, deferred: bool = False) -> Iterator[Termination]:
    """Handle SIGTERM within a block; does nothing outside of a process's main thread.

    If ``deferred``, the signal only sets `Termination.requested` and never raises.
    """
    termination = Termination(deferred=deferred)
    if threading.current_thread() is not threading.main_thread():
        yield termination
        return
    before = signal.signal(signal.SIGTERM, termination._on_signal)
    try:
        yield termination
    finally:
        signal.signal(signal.SIGTERM, before)
