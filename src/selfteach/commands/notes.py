"""Print the package's log messages, such as renamed recipe keys, as plain lines on stderr."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from selfteach.analysis.terminal.sanitize import sanitized
from selfteach.runtime import torchrun

LOGGER = "selfteach"
"""Name of the package's logger; `config.migrations` reports renamed recipe keys on it."""


class NoteHandler(logging.Handler):
    """Writes each message as ``note: MESSAGE`` on stderr.

    A renamed recipe key is printed once, for the first file that has it: the runs of a study all hold
    the keys of its recipe.
    """

    def __init__(self) -> None:
        super().__init__()
        self._printed: set[tuple[object, ...]] = set()

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record unless it is a repeated key or this is not the main rank."""
        if not torchrun.is_main():
            return
        if record.name == LOGGER and isinstance(record.args, tuple):
            _, *renamed = record.args  # the file first, then the old and the new name
            if tuple(renamed) in self._printed:
                return
            self._printed.add(tuple(renamed))
        sys.stderr.write(f"note: {sanitized(record.getMessage())}\n")


@contextmanager
def notes_on_stderr() -> Iterator[None]:
    """Print the package's log messages on stderr, and nowhere else, while the context is open."""
    logger, handler = logging.getLogger(LOGGER), NoteHandler()
    propagated = logger.propagate
    logger.addHandler(handler)
    logger.propagate = False  # a library may have configured the root logger: no line twice
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagated


def mute_notes() -> None:
    """Drop messages logged on the package's logger itself: another process has printed them."""
    logging.getLogger(LOGGER).addFilter(lambda record: False)
