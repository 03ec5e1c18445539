"""Work in a process of its own that a test may kill, forked: torch is imported already.

A kill does not ask how its process began. That commands answer as they should is tested with real ones.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import Any

PATIENCE_S = 120


def killed(until: Callable[[], object], work: Callable[..., Any], *args: Any) -> None:
    """Begin ``work(*args)`` and send SIGKILL as soon as ``until`` is true."""
    process = begun(until, work, *args)
    process.kill()
    process.join()


def begun(until: Callable[[], object], work: Callable[..., Any], *args: Any) -> BaseProcess:
    """The process of ``work(*args)``, as soon as ``until`` is true; fails if it has ended before."""
    process = multiprocessing.get_context("fork").Process(target=work, args=args)
    process.start()
    deadline = time.monotonic() + PATIENCE_S
    while not until():
        if time.monotonic() > deadline or not process.is_alive():
            process.kill()
            raise AssertionError(f"ended too early, or never came so far ({process.exitcode})")
        time.sleep(0.002)
    return process
