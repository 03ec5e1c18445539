"""Compares answers in a subprocess that can be killed: no answer can hang or crash a run."""

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

from selfteach.runtime.api_keys import child_environment

WORKER = Path(__file__).with_name("verify_worker.py")
TIMEOUT_S = 5.0
"""Time limit of one comparison, in seconds; math-verify's default."""
START_S = 120.0
"""Time limit for importing sympy or reasoning-gym before the first comparison, in seconds."""


class VerifierProcess:
    """Runs `verify_worker` in a subprocess, started on first use; thread-safe, one request at a time.

    Replies are cached in memory: verifier, critic's parser and report send the same requests.
    """

    def __init__(self, *, timeout_s: float = TIMEOUT_S) -> None:
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._replies: dict[bytes, dict[str, Any]] = {}
        self._imported: set[str] = set()
        self.timeouts = 0
        """Number of requests that timed out or killed the worker."""

    def request(self, library: str, **arguments: Any) -> dict[str, Any]:
        """Return the worker's reply; ``{"error": …}`` if it failed, timed out or died.

        ``library`` is ``math`` (arguments of `verify_worker.equal`) or ``gym`` (of
        `verify_worker.score`).
        """
        line = json.dumps({"kind": library, **arguments}, sort_keys=True)
        key = hashlib.blake2b(line.encode(), digest_size=16).digest()
        with self._lock:
            if key not in self._replies:
                self._replies[key] = self._reply(library, line)
            return self._replies[key]

    def _reply(self, library: str, line: str) -> dict[str, Any]:
        process = self._running()
        if library not in self._imported:
            _exchange(process, json.dumps({"kind": "import", "library": library}), START_S)
            self._imported.add(library)
        reply = _exchange(process, line, self._timeout_s)
        if reply is None:
            self.timeouts += 1
            self.close()
            return {"error": "timed out or died"}
        return reply

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self._imported.clear()
            # -P keeps the script's folder off sys.path: its modules must not shadow standard ones.
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(WORKER)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                env=child_environment(OMP_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="1"),
                start_new_session=True,  # Ctrl-C goes to the parent; the worker ends with its pipe
            )  # fmt: skip
            weakref.finalize(self, _end, self._process)
        return self._process

    def close(self) -> None:
        """Kill the worker; the next request starts another."""
        if self._process is not None:
            _end(self._process)
            self._process = None


def _exchange(process: subprocess.Popen[bytes], line: str, limit_s: float) -> dict[str, Any] | None:
    """Send a line and return the reply; None if it timed out or the worker died."""
    try:
        assert process.stdin is not None
        process.stdin.write(line.encode() + b"\n")
        process.stdin.flush()
        reply = _read_line(process, limit_s)
    except (OSError, TimeoutError):
        return None
    return json.loads(reply) if reply.endswith(b"\n") else None


def _read_line(process: subprocess.Popen[bytes], limit_s: float) -> bytes:
    """Read one line, or what the worker wrote before it died. Raises `TimeoutError`."""
    assert process.stdout is not None
    deadline, line = time.monotonic() + limit_s, b""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while not line.endswith(b"\n"):
            if not selector.select(deadline - time.monotonic()):
                raise TimeoutError
            chunk = os.read(process.stdout.fileno(), 65536)
            if not chunk:
                break
            line += chunk
    return line


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):  # unwritten data of a dead process
                pipe.close()
