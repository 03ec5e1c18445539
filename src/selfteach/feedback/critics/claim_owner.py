"""Gives a process's claims an owner that is unique, and evidence of whether an owner is alive.

A process id is no evidence: containers have process ids of their own and may share a host name. An
owner is a random id with a file that its process keeps locked; the kernel releases the lock when the
process ends, however it ends. A lock is evidence between processes of one kernel. Between machines only
a lease is: the owner renews its claims, and one that is not renewed for long is given up.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import uuid
import weakref
from pathlib import Path

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
"""Tells kernels apart, and is the same in all containers of one."""


def kernel() -> str:
    """Return the id of the running kernel; empty where there is none, so that only leases count."""
    try:
        return BOOT_ID.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""


class ClaimOwner:
    """Owns the claims of this process for as long as it lives; holds the lock of its file."""

    def __init__(self, folder: Path) -> None:
        self.id, self.pid, self.kernel = uuid.uuid4().hex, os.getpid(), kernel()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(folder / self.id, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o644)
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # a file system without locks
            self.kernel = ""
            return
        weakref.finalize(self, _leave, handle, folder / self.id, self.pid)


def has_ended(folder: Path, owner: str, owners_kernel: str) -> bool:
    """Return True if there is evidence that an owner has ended: its lock, of this kernel, is free."""
    if not owners_kernel or owners_kernel != kernel() or "/" in owner:
        return False
    try:
        handle = os.open(folder / owner, os.O_RDWR | os.O_CLOEXEC)
    except OSError:  # not seen from here: no evidence
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError:
        return False
    finally:
        os.close(handle)


def forget(folder: Path, owner: str) -> None:
    """Remove the file of an owner that has ended and has no claims any more."""
    with contextlib.suppress(OSError):
        (folder / owner).unlink()


def _leave(handle: int, path: Path, pid: int) -> None:
    """Remove the file of an owner that is used no more; in a forked child it stays the parent's."""
    if pid == os.getpid():
        with contextlib.suppress(OSError):
            path.unlink()
        os.close(handle)
