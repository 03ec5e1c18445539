"""Compares answers in a subprocess that can be killed: no answer can hang or crash a run."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import IO, Any

from selfteach.errors import DataError
from selfteach.runtime.api_keys import child_environment

TIMED_OUT = {"error": "timed out", "timed_out": True}
"""The reply to a request that no worker answered."""
WORKER = Path(__file__).with_name("verify_worker.py")
TIMEOUT_S = 5.0
"""Limit of one comparison in seconds of CPU time, which does not depend on the machine's load."""
STALL_FACTOR = 6.0
"""A worker that has not replied after this many times its limit, by the clock, is replaced."""
ATTEMPTS = 2
"""Workers that try a comparison before it counts as timed out: a stall is not the answer's fault."""
START_S = 120.0
"""Time limit for importing sympy or reasoning-gym before the first comparison, in seconds."""


class VerifierProcess:
    """Runs `verify_worker` in a subprocess, started on first use; thread-safe, one request at a time.

    Replies are cached in memory: verifier, critic's parser and report send the same requests. The
    worker ends with this process, however that ends.
    """

    def __init__(self, *, timeout_s: float = TIMEOUT_S) -> None:
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._life: IO[bytes] | None = None
        self._replies: dict[str, dict[str, Any]] = {}
        self._imported: set[str] = set()
        self._journal: Path | None = None
        self.timeouts = 0
        """Number of requests that timed out."""

    def keep_timeouts(self, path: Path) -> None:
        """Store timed-out requests in a file, and reply to those that it holds as before.

        So a resumed run judges its rollouts as it did, also where that depended on the machine.
        """
        with self._lock:
            self._journal = path
            self._replies |= {key: dict(TIMED_OUT) for key, _ in read_keys(path)}

    def request(self, library: str, **arguments: Any) -> dict[str, Any]:
        """Return the worker's reply; ``{"error": …}`` if it failed, ``timed_out`` if killed.

        ``library`` is ``math`` (arguments of `verify_worker.equal`) or ``gym`` (of
        `verify_worker.score`). Raises `DataError` if the library cannot be imported.
        """
        line = json.dumps({"kind": library, **arguments}, sort_keys=True)
        key = hashlib.blake2b(line.encode(), digest_size=16).hexdigest()
        with self._lock:
            if key not in self._replies:
                try:
                    self._replies[key] = reply = self._reply(library, line)
                except BaseException:  # an interrupt: the late reply would be the next request's
                    self.close()
                    raise
                if reply == TIMED_OUT and self._journal is not None:
                    append_row(self._journal, {"timed_out": key})
            return self._replies[key]

    def _reply(self, library: str, line: str) -> dict[str, Any]:
        for _ in range(ATTEMPTS):
            process = self._running(library)
            reply = exchange(process, line, STALL_FACTOR * self._timeout_s)
            if reply is not None:
                return reply
            self.close()
            if process.returncode == -signal.SIGPROF:  # its limit: another try would end so too
                break
        self.timeouts += 1
        return dict(TIMED_OUT)

    def _running(self, library: str) -> subprocess.Popen[bytes]:
        """Return a running worker that has imported a library."""
        for _ in range(ATTEMPTS):
            if self._process is None or self._process.poll() is not None:
                self.close()
                self._imported.clear()
                self._process = self._start()
            if library in self._imported:
                return self._process
            request = json.dumps({"kind": "import", "library": library})
            reply = exchange(self._process, request, START_S)
            if reply is not None and "error" in reply:
                raise DataError(f"the verifier cannot import its library: {reply['error']}")
            if reply is not None:
                self._imported.add(library)
                return self._process
            self.close()
        raise DataError(
            f"the verifier's process ended, or did not start within {START_S:.0f} s: free memory, or "
            "try again"
        )

    def _start(self) -> subprocess.Popen[bytes]:
        # Nothing is ever written to this pipe: its end tells the worker that this process has ended.
        reader, writer = os.pipe()
        # -P keeps the script's folder off sys.path: its modules must not shadow standard ones.
        process = subprocess.Popen(
            [sys.executable, "-P", str(WORKER), str(self._timeout_s), str(reader)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            env=child_environment(OMP_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="1"),
            start_new_session=True,  # Ctrl-C goes to the parent; the worker ends with its pipe
            pass_fds=(reader,),
        )  # fmt: skip
        os.close(reader)
        self._life = os.fdopen(writer, "wb")
        weakref.finalize(self, end_process, process, self._life)
        return process

    def close(self) -> None:
        """Kill the worker; the next request starts another."""
        if self._process is not None:
            end_process(self._process, self._life)
            self._process = None


def exchange(process: subprocess.Popen[bytes], line: str, limit_s: float) -> dict[str, Any] | None:
    """Send a line and return the reply; None if it timed out or the worker died.

    A caller that is interrupted meanwhile must end the process: its reply would answer the next line.
    """
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


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Append a line to a file, on disk before it counts; several processes may append to one file."""
    with path.open("ab", buffering=0) as handle:
        handle.write(json.dumps(row).encode() + b"\n")
        os.fsync(handle.fileno())


def read_keys(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Return the rows of the file of timeouts with their keys, without a truncated line."""
    rows = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
            key = row["timed_out"]
        except (ValueError, KeyError, TypeError):
            continue
        if isinstance(key, str):
            rows.append((key, row))
    return rows


def end_process(process: subprocess.Popen[bytes], life: IO[bytes] | None = None) -> None:
    """Kill a process, and close its pipes."""
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout, life):
        if pipe is not None:
            with contextlib.suppress(OSError):  # unwritten data of a dead process
                pipe.close()
