"""Runs a function in a forked process that a test may kill: torch is imported already.

A kill is the same for a forked process and a new one. Other tests start commands as real processes.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

TIMEOUT_S = 120


def kill_when(condition: Callable[[], object], work: Callable[..., Any], *args: Any) -> None:
    """Start ``work(*args)`` and send SIGKILL as soon as ``condition()`` is true."""
    process = run_until(condition, work, *args)
    process.kill()
    process.join()


def run_until(condition: Callable[[], object], work: Callable[..., Any], *args: Any) -> BaseProcess:
    """Return the process of ``work(*args)`` once ``condition()`` is true; fail if it ends before."""
    process = multiprocessing.get_context("fork").Process(target=work, args=args)
    process.start()
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        if time.monotonic() > deadline or not process.is_alive():
            process.kill()
            raise AssertionError(
                f"ended too early, or did not get there in time ({process.exitcode})"
            )
        time.sleep(0.002)
    return process


def command_line(errors: Path, *words: object) -> None:
    """Run the console script, as a shell would: what it says of errors is in a file."""
    from selfteach.cli import main

    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored under nohup
    os.dup2(os.open(errors, os.O_CREAT | os.O_WRONLY), 2)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    sys.argv = ["selfteach", *map(str, words)]
    main()
