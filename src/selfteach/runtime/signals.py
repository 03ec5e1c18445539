"""Handles the signals that ask a process to end: SIGTERM from a scheduler, SIGINT from Ctrl-C.

While weights change, or are swapped for a teacher's, an exception would leave a mixture of both. So a
signal ends the process only in blocks that are declared interruptible: waiting, sampling, evaluating.
Elsewhere it is remembered until the next such block. A second SIGINT ends the process at once, even if
the main thread is in a call that does not return: a thread of its own waits for it.

Many ranks must stop at the same step: there the signal is only remembered (`Termination.requested`),
and after each step the ranks exchange it.

SIGINT is Python's KeyboardInterrupt unless the command line has called `handle_interrupts`: a notebook
keeps its own handling.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from selfteach.errors import Terminated

EXIT_STATUS = 143
"""Exit status of a run that was ended by SIGTERM and has saved its progress: 128 + 15."""
INTERRUPTED_STATUS = 130
"""Exit status of a command that was ended by Ctrl-C: 128 + 2."""
PATIENCE_S = 2.0
"""Seconds after which a process that has not ended says that a second Ctrl-C will end it."""


class Termination:
    """Remembers whether a signal to end has arrived, and whether the process may end now."""

    def __init__(self, *, deferred: bool = False) -> None:
        self.requested = False
        """True once a signal has arrived."""
        self.status = EXIT_STATUS
        """Exit status for the signal that has arrived."""
        self._deferred, self._interruptible = deferred, False

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Let a signal raise `Terminated` anywhere in a block, or at its start if it arrived before.

        Raises nothing if termination is deferred.
        """
        self._interruptible = not self._deferred
        try:
            if self.requested and self._interruptible:
                raise Terminated(self.status)
            yield
        finally:
            self._interruptible = False

    def on_signal(self, number: int, *_: object) -> None:
        """Remember a signal; raise `Terminated` where the process may end."""
        self.requested = True
        self.status = _status_of(number)
        if self._interruptible:
            raise Terminated(self.status)


class _Interrupts:
    """Receives SIGINT for a command line: raises `Terminated`, or gives it to the `Termination`."""

    def __init__(self) -> None:
        self.termination: Termination | None = None

    def __call__(self, number: int, *_: object) -> None:
        if self.termination is None:
            raise Terminated(_status_of(number))
        self.termination.on_signal(number)


@contextmanager
def handle_termination(*, deferred: bool = False) -> Iterator[Termination]:
    """Handle SIGTERM within a block, and SIGINT if `handle_interrupts` has been called.

    Does nothing outside of a process's main thread. If ``deferred``, a signal only sets
    `Termination.requested` and never raises.
    """
    termination = Termination(deferred=deferred)
    if threading.current_thread() is not threading.main_thread():
        yield termination
        return
    interrupts = signal.getsignal(signal.SIGINT)
    before = signal.signal(signal.SIGTERM, termination.on_signal)
    if isinstance(interrupts, _Interrupts):
        interrupts.termination = termination
    try:
        yield termination
    finally:
        if isinstance(interrupts, _Interrupts):
            interrupts.termination = None
        signal.signal(signal.SIGTERM, before)


def handle_interrupts() -> None:
    """Let SIGINT raise `Terminated` from now on, and a second SIGINT end the process at once.

    For the main thread of a command line. Does nothing where SIGINT is ignored, as under ``nohup``.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        return
    signal.signal(signal.SIGINT, _Interrupts())
    if os.name != "posix":
        return
    # The interpreter writes each signal's number here when it arrives, whatever the main thread does.
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(reading,), name="interrupts", daemon=True).start()


@contextmanager
def keeping(progress: str | Callable[[], str]) -> Iterator[None]:
    """Say, if a signal ends the process within a block, what is on disk and how to go on."""
    try:
        yield
    except Terminated as end:
        end.progress = end.progress or (progress if isinstance(progress, str) else progress())
        raise


@contextmanager
def blocked_interrupts() -> Iterator[None]:
    """Hold SIGINT back within a block, and for ever in processes that are started in it.

    Ctrl-C in a terminal reaches all processes of a command: only the first of them handles it.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _watch(reading: int) -> None:
    """End the process at the second SIGINT."""
    count = 0
    while True:
        count += os.read(reading, 64).count(signal.SIGINT)
        if count > 1:
            _write("selfteach: interrupted again, ended at once; selfteach resume continues a run")
            os._exit(INTERRUPTED_STATUS)
        elif count == 1:
            hint = threading.Timer(PATIENCE_S, _hint)
            hint.daemon = True
            hint.start()


def _hint() -> None:
    _write("selfteach: interrupted; ends when it can; Ctrl-C again ends it at once")


def _write(line: str) -> None:
    os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"{line}\n".encode())


def _status_of(number: int) -> int:
    return INTERRUPTED_STATUS if number == signal.SIGINT else EXIT_STATUS
