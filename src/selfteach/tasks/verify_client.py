"""Comparing answers in a process that can be killed: no answer hangs a run or raises into it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import selectors
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import Any

CHILD = Path(__file__).with_name("verify_worker.py")
TIMEOUT_S = 5.0
"""For one comparison; math-verify's own default."""
START_S = 120.0
"""For importing sympy or reasoning-gym before the first."""


class Judge:
    """Asks `judge_child` from any thread, one question at a time; begins it when it is needed.

    Answers are remembered: verifier, critic's reader and report ask about the same ones.
    """

    def __init__(self, *, timeout_s: float = TIMEOUT_S) -> None:
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._known: dict[bytes, dict[str, Any]] = {}
        self._warm: set[str] = set()
        self.timeouts = 0
        """Questions given up, for whoever counts them."""

    def ask(self, what: str, **question: Any) -> dict[str, Any]:
        """The child's reply; ``{"error": …}`` if it failed, took too long or died of it."""
        line = json.dumps({"what": what, **question}, sort_keys=True)
        key = hashlib.blake2b(line.encode(), digest_size=16).digest()
        with self._lock:
            if key not in self._known:
                self._known[key] = self._reply(what, line)
            return self._known[key]

    def _reply(self, what: str, line: str) -> dict[str, Any]:
        process = self._running()
        if what not in self._warm:
            _exchange(process, json.dumps({"what": "ready", "library": what}), START_S)
            self._warm.add(what)
        said = _exchange(process, line, self._timeout_s)
        if said is None:
            self.timeouts += 1
            self.close()
            return {"error": "gave up"}
        return said

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self._warm.clear()
            # -P: the script's own folder holds a types.py, which is not the standard library's.
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(CHILD)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                start_new_session=True,  # Ctrl-C is ours to handle; the child ends with its pipe
            )  # fmt: skip
            weakref.finalize(self, _end, self._process)
        return self._process

    def close(self) -> None:
        """End the child; the next question begins another."""
        if self._process is not None:
            _end(self._process)
            self._process = None


def _exchange(process: subprocess.Popen[bytes], line: str, limit_s: float) -> dict[str, Any] | None:
    """The reply to a line; None if it did not come in time or the child died of it."""
    try:
        assert process.stdin is not None
        process.stdin.write(line.encode() + b"\n")
        process.stdin.flush()
        said = _read_line(process, limit_s)
    except (OSError, TimeoutError):
        return None
    return json.loads(said) if said.endswith(b"\n") else None


def _read_line(process: subprocess.Popen[bytes], limit_s: float) -> bytes:
    """One line of the child's, or what came before it died. Raises TimeoutError."""
    assert process.stdout is not None
    deadline, said = time.monotonic() + limit_s, b""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while not said.endswith(b"\n"):
            if not selector.select(deadline - time.monotonic()):
                raise TimeoutError
            part = os.read(process.stdout.fileno(), 65536)
            if not part:
                break
            said += part
    return said


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):  # what was still to be written
                pipe.close()
