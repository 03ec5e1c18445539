"""Takes rights from this process for good: files (Landlock), capabilities, resources."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import struct
from collections.abc import Iterable

CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
"""Landlock's system calls, the same numbers on every architecture."""
VERSION_FLAG, PATH_BENEATH = 1, 1
WRITE_FILE, READ_FILE, READ_DIR, REMOVE_FILE, MAKE_FILE, TRUNCATE = 2, 4, 8, 32, 256, 16384
RIGHTS_OF_ABI = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}
"""Number of rights on files that a version of Landlock knows."""
READ = READ_FILE | READ_DIR
SCRATCH = READ | WRITE_FILE | REMOVE_FILE | MAKE_FILE | TRUNCATE
"""What the scratch folder permits: files; no folders, links, devices, pipes or sockets."""
MIN_ABI = 3
"""The first version that restricts truncation; before it, a file may be emptied by its path."""
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS = 1, 4, 38
CAPABILITY_VERSION = 0x20080522
CAPSET = {"x86_64": 126, "aarch64": 91}
MAX_OPEN_FILES = 64

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long


def check(result: int, what: str) -> int:
    """Return a result of the C library. Raises `OSError` if it is an error."""
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result


def landlock_abi() -> int:
    """Return the version of Landlock that the kernel has; 0 without Landlock."""
    return max(0, libc.syscall(CREATE_RULESET, None, ctypes.c_size_t(0), VERSION_FLAG))


def restrict_files(readable: Iterable[str], scratch: str | None) -> None:
    """Restrict this process to reading some paths, and to files in one folder. Raises `OSError`.

    Where the kernel knows how, TCP ports and signals and abstract sockets of other processes are
    refused too.
    """
    abi = landlock_abi()
    rights = (1 << RIGHTS_OF_ABI.get(abi, 16)) - 1
    attributes = struct.pack("=QQQ", rights, 3 if abi >= 4 else 0, 3 if abi >= 6 else 0)
    size = 8 if abi < 4 else 16 if abi < 6 else 24
    check(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    ruleset = check(libc.syscall(CREATE_RULESET, attributes, ctypes.c_size_t(size), 0), "Landlock")
    for path in readable:
        _permit(ruleset, path, READ & rights)
    _permit(ruleset, "/dev/null", (READ_FILE | WRITE_FILE) & rights)
    if scratch is not None:
        _permit(ruleset, scratch, SCRATCH & rights)
    check(libc.syscall(RESTRICT_SELF, ruleset, 0), "Landlock")
    os.close(ruleset)


def _permit(ruleset: int, path: str, rights: int) -> None:
    try:
        parent = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:  # a path that the system does not have needs no permission
        return
    if not os.path.isdir(path):  # noqa: PTH112 - pathlib is slow to import
        rights &= READ_FILE | WRITE_FILE | TRUNCATE
    rule = struct.pack("=Qi", rights, parent)
    check(libc.syscall(ADD_RULE, ruleset, PATH_BENEATH, rule, 0), f"Landlock: {path}")
    os.close(parent)


def drop_capabilities() -> None:
    """Drop all capabilities, also those of root; files of root stay its own. Raises `OSError`."""
    header = struct.pack("=Ii", CAPABILITY_VERSION, 0)
    number = CAPSET[os.uname().machine]
    check(libc.syscall(number, header, struct.pack("=6I", *[0] * 6)), "capset")


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends; the parent has one thread."""
    check(libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "prctl")


def hide_memory() -> None:
    """Keep other processes of this user from reading this one's memory."""
    check(libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0), "prctl")


def limit_resources(
    *, cpu_s: float, memory_bytes: int, file_bytes: int, processes: int | None,
    stack_bytes: int | None = None,
) -> None:  # fmt: skip
    """Limit CPU time, address space, size of a file, open files and processes of this process.

    Outside of a user namespace the kernel counts all processes of the user, the trainer's threads too:
    ``processes`` is then None, which limits nothing. The main thread's stack may grow to
    ``stack_bytes``; no thread's does.
    """
    seconds = int(cpu_s) + 2  # the watchdog ends it earlier, to the hundredth of a second
    for name, value in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_FSIZE, file_bytes),
        (resource.RLIMIT_NOFILE, MAX_OPEN_FILES),
        (resource.RLIMIT_NPROC, processes),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
        (resource.RLIMIT_STACK, stack_bytes),
    ):
        if value is None:
            continue
        _, hard = resource.getrlimit(name)
        lowest = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(name, (lowest, lowest))
