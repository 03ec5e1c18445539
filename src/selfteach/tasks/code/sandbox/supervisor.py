"""Judges answers one after another: JSON lines in, JSON lines out. Started by `code_pool`.

Three kinds of processes share the work. This one reads requests and forks a judge for each, which knows
what is expected. A zygote, a clean interpreter, forks the isolated process that runs the answer.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
from typing import Any

from . import confinement, judge, seccomp_filter
from .guest_process import TestingOver

JUDGE_MEMORY_BYTES = 2 << 30
JUDGE_CPU_S = 20.0
"""CPU time for tests' own code and comparisons."""
WALL_FACTOR, WALL_EXTRA_S = 25.0, 30.0
"""A judge that has no result after this many times the processes' CPU time, and this, is ended."""
MAX_RESULT_BYTES = 2 << 20
"""An outcome is shorter: a program's output of `judge.MAX_OUTPUT_CHARS` takes twelve bytes for each."""


def main() -> None:
    """Start the zygote, report, and serve requests until standard input ends."""
    settings = json.loads(sys.stdin.buffer.readline())
    out = os.dup(1)
    os.dup2(2, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Supervisor(settings, out).serve()


class Supervisor:
    """Holds the zygote, and a forked judge at a time."""

    def __init__(self, settings: dict[str, Any], out: int) -> None:
        self._settings, self._out = settings, out
        self._zygote: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None

    def serve(self) -> None:
        """Answer each request with a line; the first line says whether isolation works."""
        try:
            self._start_zygote()
            self._write({"ready": True})
        except (OSError, RuntimeError, subprocess.SubprocessError) as error:
            self._write({"error": str(error)[:500]})
            return
        for line in sys.stdin.buffer:
            request = json.loads(line)
            try:
                if self._zygote is None or self._zygote.poll() is not None:
                    self._start_zygote()
                outcome = self._judge(request)
            except (OSError, RuntimeError) as error:
                outcome = {"kind": "broken", "detail": str(error)[:300]}
            self._write(outcome)

    def _write(self, reply: dict[str, Any]) -> None:
        view = memoryview(json.dumps(reply).encode() + b"\n")
        while view:
            view = view[os.write(self._out, view) :]

    def _start_zygote(self) -> None:
        """Start a zygote in an empty environment. Raises `RuntimeError` if it cannot isolate."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        fd = theirs.fileno()
        settings = [self._settings[key] for key in ("isolation", "readable", "scratch")]
        code = (
            f"import sys; sys.path.append({self._settings['folder']!r}); "
            f"from sandbox.zygote import main; main({fd}, *{settings!r})"
        )
        self._zygote = subprocess.Popen(
            [*self._settings["wrapper"], *self._settings["python"], "-c", code],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            env=self._settings["environment"], pass_fds=(fd,), cwd="/",
        )  # fmt: skip
        theirs.close()
        ours.settimeout(60)
        ready = ours.recv(16)
        if ready != b"ready":
            assert self._zygote.stderr is not None
            lines = self._zygote.stderr.read(4000).decode("utf-8", "replace").strip().splitlines()
            raise RuntimeError(lines[-1] if lines else "the isolated process did not start")
        ours.setblocking(True)
        self._channel = ours

    def _judge(self, request: dict[str, Any]) -> dict[str, Any]:
        """Fork a judge, and return its result; the end of standard input ends this process too."""
        result, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(result)
            self._be_judge(request, writer)
        os.close(writer)
        content, in_time = self._read(result, _wall_s(request))
        if not in_time:
            os.kill(pid, signal.SIGKILL)
        os.close(result)
        _, status = os.waitpid(pid, 0)
        if content and in_time:
            return json.loads(content)
        if (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGPROF) or not in_time:
            return {"kind": "timeout", "detail": "comparison" if in_time else "wall"}
        return {"kind": "broken", "detail": f"the judge ended with status {status}"}

    def _read(self, pipe: int, limit_s: float) -> tuple[bytes, bool]:
        """Read to a pipe's end; the second value is False if that takes too long."""
        poll, content = select.poll(), b""
        poll.register(pipe, select.POLLIN)
        poll.register(0, 0)
        while len(content) <= MAX_RESULT_BYTES:
            events = dict(poll.poll(limit_s * 1000))
            if not events:
                return b"", False
            if pipe in events:
                chunk = os.read(pipe, 1 << 16)
                if not chunk:
                    return content, True
                content += chunk
            elif events.get(0, 0) & (select.POLLHUP | select.POLLERR):
                os._exit(0)  # judge, zygote, watchdog and answer end with this process
        return b"", False

    def _be_judge(self, request: dict[str, Any], writer: int) -> None:
        """Judge the answer with few rights, and write the outcome; never returns."""
        assert self._channel is not None
        try:
            confinement.die_with_parent()
            null = os.open("/dev/null", os.O_RDWR)
            for fd in (0, 1, 2):
                os.dup2(null, fd)
            os.close(self._out)
            self._restrict_judge()
            try:
                outcome = judge.judge(request, self._channel)
            except TestingOver as over:
                outcome = over.outcome
        except BaseException as error:
            outcome = {"kind": "tests", "detail": f"{type(error).__name__}: {error}"[:300]}
        view = memoryview(_written(outcome))
        while view:
            view = view[os.write(writer, view) :]
        os._exit(0)

    def _restrict_judge(self) -> None:
        """Take this process's rights: the tests come from a data set, and need nothing but a CPU."""
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_PROF, JUDGE_CPU_S)
        confinement.limit_resources(
            cpu_s=2 * JUDGE_CPU_S, memory_bytes=JUDGE_MEMORY_BYTES, file_bytes=0, processes=None
        )
        if self._settings["isolation"] == "rlimits":
            return
        if confinement.landlock_abi() >= 1:
            confinement.restrict_files(self._settings["readable"], None)
        confinement.drop_capabilities()
        seccomp_filter.install(messages=True)


def _written(outcome: dict[str, Any]) -> bytes:
    """Return an outcome as JSON. One that cannot be written, or is too long, is the answer's doing."""
    try:
        line = json.dumps(outcome).encode()
    except (ValueError, TypeError, RecursionError) as error:
        line = json.dumps(
            {"kind": "exit", "detail": f"sent no plain values: {error}"[:300]}
        ).encode()
    if len(line) <= MAX_RESULT_BYTES:
        return line
    limit = f"an outcome of more than {MAX_RESULT_BYTES >> 20} MiB"
    return json.dumps({"kind": "output", "detail": limit}).encode()


def _wall_s(request: dict[str, Any]) -> float:
    tests = request["tests"]
    processes = len(tests["cases"]) if tests["shape"] == "programs" else 1
    return processes * (WALL_FACTOR * request["limits"]["cpu_s"]) + WALL_EXTRA_S
