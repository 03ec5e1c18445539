"""Starts isolated processes by forking a clean interpreter: it holds no test, no answer, no secret.

A request is a line of limits with five file descriptors. For each, a watchdog is forked, and from it
the process that runs the answer. The watchdog ends that process at its limits or as soon as nobody can
send it requests any more, and then reports how it ended.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import select
import shutil
import signal
import socket
import sys
import tempfile
import time
from typing import Any

from . import confinement, guest, namespaces, seccomp_filter

PRELOADED = (
    "abc", "array", "bisect", "cmath", "collections", "copy", "dataclasses", "datetime",
    "decimal", "enum", "fractions", "functools", "heapq", "io", "itertools", "json",
    "math", "numbers", "operator", "queue", "random", "re", "statistics", "string",
    "textwrap", "time", "typing",
)  # fmt: skip
"""Modules that answers import often; here once, and not in every process's CPU time."""
GRACE_S = 0.1
"""Time in which a process may report the line that runs at its limit."""
IDLE_FACTOR, WALL_FACTOR = 2.0, 20.0
"""Limits of the time that a process waits by itself, and of all time, as multiples of its CPU time."""
MAX_THREADS = 64
MAX_FILES = 256
STACK_BYTES = 100 << 20
"""Stack of an answer: recursion through functions in C (a cached function, a key of a sort) takes half
a kilobyte or more for each call, and programs allow 50,000. The kernel leaves room for 128 MiB."""
CHILD_SUBREAPER = 36
FAULTS = 5
"""Descriptor of the pipe that says why a process could not be isolated."""
BOXED = ("bubblewrap", "namespaces")


def main(socket_fd: int, isolation: str, readable: list[str], scratch: str) -> None:
    """Serve requests until the socket's other end closes."""
    confinement.die_with_parent()
    for name in PRELOADED:
        __import__(name)
    processes = os.open("/proc", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    if isolation == "landlock" and confinement.landlock_abi() < confinement.MIN_ABI:
        raise OSError(f"the kernel has no Landlock of version {confinement.MIN_ABI} or later")
    if isolation == "namespaces":
        namespaces.enter_box(readable)
    confinement.hide_memory()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    channel = socket.socket(fileno=socket_fd)
    channel.send(b"ready")
    gc.collect()
    gc.freeze()
    while True:
        message, fds, _, _ = socket.recv_fds(channel, 1 << 16, 8)
        if not message:
            return
        limits = json.loads(message)
        if os.fork() == 0:
            channel.close()
            _watch(limits, fds, isolation, readable, scratch, processes)
        for fd in fds:
            os.close(fd)


def _watch(
    limits: dict[str, Any], fds: list[int], isolation: str, readable: list[str],
    scratch: str, processes: int,
) -> None:  # fmt: skip
    """Fork the process that runs the answer, and wait for it; never returns."""
    requests, replies, status, stdin, stdout = fds
    confinement.die_with_parent()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    report: dict[str, Any] = {}
    folder = namespaces.SCRATCH if isolation in BOXED else tempfile.mkdtemp(dir=scratch)
    try:
        if isolation in BOXED:
            namespaces.enter_process_namespace()
            namespaces.mount_scratch(limits["scratch_bytes"])
        else:
            confinement.libc.prctl(CHILD_SUBREAPER, 1, 0, 0, 0)
        fault, faults = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(status)
            pipes = (requests, replies, stdin, stdout, faults)
            _become_guest(limits, pipes, isolation, readable, folder)
        for fd in (replies, stdin, stdout, faults):
            os.close(fd)
        detail = os.read(fault, 1 << 12)  # ends before the process reads its first request
        report = Watchdog(child, requests, limits, processes, folder, isolation).wait()
        if detail:
            report |= {"why": "broken", "detail": detail.decode("utf-8", "replace")}
        if isolation not in BOXED:
            kill_remaining()
    except OSError as error:
        report = {"why": "broken", "detail": str(error)}
    if isolation not in BOXED:
        shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):
        os.write(status, json.dumps(report).encode())
    os._exit(0)


def _become_guest(
    limits: dict[str, Any], fds: tuple[int, ...], isolation: str, readable: list[str], folder: str
) -> None:
    """Give up every right but those of an answer, and run it; never returns.

    What goes wrong before is written to a pipe that no answer sees: it is closed by then.
    """
    faults = fds[-1]
    try:
        confinement.die_with_parent()
        os.setpgid(0, 0)
        requests, replies, stdin, stdout, faults = (_above(fd, 16) for fd in fds)
        null = os.open("/dev/null", os.O_WRONLY)
        ends = ((stdin, 0), (stdout, 1), (null, 2), (requests, 3), (replies, 4), (faults, FAULTS))
        for fd, target in ends:
            os.dup2(fd, target, inheritable=False)
        faults = FAULTS
        os.closerange(FAULTS + 1, 1 << 16)
        os.chdir(folder)
        os.environ.update(TMPDIR=folder, HOME=folder)
        tempfile.tempdir = None
        confinement.limit_resources(
            cpu_s=limits["cpu_s"], memory_bytes=limits["memory_bytes"],
            file_bytes=limits["scratch_bytes"],
            processes=None if isolation == "landlock" else MAX_THREADS, stack_bytes=STACK_BYTES,
        )  # fmt: skip
        if isolation == "landlock" or (confinement.landlock_abi() and isolation != "rlimits"):
            confinement.restrict_files(readable, folder)
        try:
            confinement.drop_capabilities()
            confinement.hide_memory()
            seccomp_filter.install()
        except (OSError, KeyError):
            if isolation != "rlimits":
                raise
        served = guest.Guest(4, limits["refused_imports"])
    except BaseException as error:
        os.write(faults, (str(error) or type(error).__name__)[:300].encode("utf-8", "replace"))
        os._exit(70)
    os.close(FAULTS)
    served.serve(3)


def _above(fd: int, lowest: int) -> int:
    import fcntl

    return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, lowest)


class Watchdog:
    """Ends a process at its limits: CPU time, idle time, threads, and files where no quota holds."""

    def __init__(
        self, child: int, requests: int, limits: dict[str, Any], processes: int, folder: str,
        isolation: str,
    ) -> None:  # fmt: skip
        self._child, self._requests, self._limits = child, requests, limits
        self._processes, self._isolation = processes, isolation
        self._folder = None if isolation in BOXED else folder
        self._begin = time.monotonic()

    def wait(self) -> dict[str, Any]:
        """Wait for the process, kill it at a limit, and return how it ended."""
        ended = os.pidfd_open(self._child)
        poll = select.poll()
        poll.register(ended, select.POLLIN)
        poll.register(self._requests, 0)  # reports its end when nobody writes any more
        reason, pause_s = None, 0.001
        while ended not in (events := dict(poll.poll(pause_s * 1000))):
            reason = "abandoned" if self._requests in events else self._exceeded()
            if reason is not None:
                self._kill(ended, politely=reason in ("cpu", "idle"))
                break
            pause_s = min(pause_s * 1.5, 0.02)
        _, status, usage = os.wait4(self._child, 0)
        code = os.waitstatus_to_exitcode(status)
        cpu_s = usage.ru_utime + usage.ru_stime
        return {"why": reason, "code": code, "cpu_s": cpu_s, "memory_kb": usage.ru_maxrss}

    def _kill(self, ended: int, *, politely: bool) -> None:
        if politely:  # its handler reports a line; a process that ignores it gains nothing
            os.kill(self._child, signal.SIGXCPU)
            select.select([ended], [], [], GRACE_S)
        if self._isolation not in BOXED:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._child, signal.SIGKILL)
        os.kill(self._child, signal.SIGKILL)

    def _exceeded(self) -> str | None:
        """Return the limit that is exceeded, or None."""
        limit_s, wall_s = self._limits["cpu_s"], time.monotonic() - self._begin
        cpu_s = self._cpu_s()
        if cpu_s >= limit_s:
            return "cpu"
        if wall_s > limit_s and wall_s - cpu_s - self._queued_s() > IDLE_FACTOR * limit_s:
            return "idle"
        if wall_s > WALL_FACTOR * limit_s:
            return "wall"
        if self._threads() > MAX_THREADS:
            return "threads"
        return "files" if self._folder is not None and self._overfull(self._folder) else None

    def _cpu_s(self) -> float:
        """Return the CPU time of all threads; the clock's number is the kernel's for a process."""
        try:
            return time.clock_gettime(~self._child << 3 | 2)
        except OSError:
            return 0.0

    def _read(self, name: str) -> str:
        try:
            fd = os.open(f"{self._child}/{name}", os.O_RDONLY, dir_fd=self._processes)
        except OSError:
            return ""
        with os.fdopen(fd) as file:
            return file.read(4096)

    def _queued_s(self) -> float:
        """Return for how long the process has waited for a CPU: that is the machine's load."""
        fields = self._read("schedstat").split()
        return int(fields[1]) / 1e9 if len(fields) > 1 else 0.0

    def _threads(self) -> int:
        _, _, rest = self._read("status").partition("Threads:")
        return int(rest.split()[0]) if rest else 1

    def _overfull(self, folder: str) -> bool:
        count = size = 0
        with os.scandir(folder) as entries:
            for entry in entries:
                count += 1
                with contextlib.suppress(OSError):
                    size += entry.stat(follow_symlinks=False).st_blocks * 512
                if count > MAX_FILES or size > self._limits["scratch_bytes"]:
                    return True
        return False


def kill_remaining() -> None:
    """Kill what the process has left behind; orphans become this process's children."""
    for _ in range(1000):
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            for child in _children():
                with contextlib.suppress(OSError):
                    os.kill(child, signal.SIGKILL)
            time.sleep(0.002)


def _children() -> list[int]:
    """Return the processes whose parent this one is."""
    me, children = str(os.getpid()), []
    for name in filter(str.isdigit, os.listdir("/proc")):  # noqa: PTH208
        try:
            with open(f"/proc/{name}/stat") as file:  # noqa: PTH123
                fields = file.read().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[1] == me:
            children.append(int(name))
    return children


if __name__ == "__main__":
    sys.exit("started by the supervisor")
