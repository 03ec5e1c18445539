"""Starts the command line: ``selfteach``, or ``python -m selfteach``."""

from __future__ import annotations

import os
import signal
from typing import NoReturn


def main() -> None:
    """Run the command line; Ctrl-C while it is still being imported ends it with one line too."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end_at_once)
    from selfteach.cli import main as run

    run()


def _end_at_once(*_: object) -> NoReturn:
    os.write(2, b"selfteach: interrupted; nothing was begun: repeat the command\n")
    os._exit(130)


if __name__ == "__main__":
    main()
