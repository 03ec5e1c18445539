"""Gives this process a world of its own: no network, and a file system of a few read-only folders."""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterable

from .confinement import check, libc

NEW_MOUNTS, NEW_CGROUPS, NEW_NAMES, NEW_IPC = 0x20000, 0x2000000, 0x4000000, 0x8000000
NEW_USERS, NEW_PROCESSES, NEW_NETWORK = 0x10000000, 0x20000000, 0x40000000
READ_ONLY, NO_SUID, NO_DEVICES, NO_EXEC = 1, 2, 4, 8
BIND, RECURSIVE, PRIVATE = 4096, 16384, 1 << 18
DETACH = 2
MOUNT_SETATTR, PIVOT_ROOT = 442, {"x86_64": 155, "aarch64": 41}
HERE, RECURSIVE_FLAG = -100, 0x8000
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")
SCRATCH = "/scratch"
MAX_FILES = 256
"""Files in the scratch folder."""
INSIDE_ID = 1000
"""User and group inside the namespace."""


def enter_box(readable: Iterable[str]) -> None:
    """Move this process to new namespaces, with a file system of these paths, read-only, and `SCRATCH`.

    Raises `OSError` where the system does not let a user make namespaces.
    """
    user, group = os.geteuid(), os.getegid()
    kinds = NEW_USERS | NEW_MOUNTS | NEW_NETWORK | NEW_IPC | NEW_NAMES | NEW_CGROUPS
    check(libc.unshare(kinds), "user namespaces")
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{INSIDE_ID} {user} 1"),
        ("gid_map", f"{INSIDE_ID} {group} 1"),
    ):
        with open(f"/proc/self/{name}", "w") as file:  # noqa: PTH123 - pathlib is slow to import
            file.write(text)
    _mount(None, "/", None, RECURSIVE | PRIVATE)
    _mount("tmpfs", "/tmp", "tmpfs", NO_SUID | NO_DEVICES, "size=1m,mode=755")
    os.mkdir("/tmp/before")  # noqa: PTH102
    check(libc.syscall(PIVOT_ROOT[os.uname().machine], b"/tmp", b"/tmp/before"), "pivot_root")
    os.chdir("/")
    for path in _outermost([*readable, *DEVICES]):
        _bind(path)
    for name in ("/lib", "/lib64"):  # links into /usr on most systems; the loader looks there
        if os.path.islink("/before" + name):  # noqa: PTH114
            os.symlink(os.readlink("/before" + name), name)  # noqa: PTH115, PTH211
    os.mkdir(SCRATCH)  # noqa: PTH102
    check(libc.umount2(b"/before", DETACH), "umount")
    os.rmdir("/before")  # noqa: PTH106
    mount_scratch(1 << 16)
    _set_read_only("/", recursive=False)


def enter_process_namespace() -> None:
    """Give this process's next child a process namespace, and both a mount namespace of their own.

    The child is the first process there: when it ends, the kernel kills all that it has started.
    """
    check(libc.unshare(NEW_PROCESSES | NEW_MOUNTS), "process namespaces")
    _mount(None, "/", None, RECURSIVE | PRIVATE)


def mount_scratch(limit_bytes: int) -> None:
    """Mount an empty folder in memory as `SCRATCH`; it goes with its mount namespace."""
    options = f"size={limit_bytes},nr_inodes={MAX_FILES},mode=700"
    _mount("tmpfs", SCRATCH, "tmpfs", NO_SUID | NO_DEVICES | NO_EXEC, options)


def _outermost(paths: Iterable[str]) -> list[str]:
    """Return the paths without those inside others."""
    chosen: list[str] = []
    for path in sorted({os.path.realpath(path) for path in paths}):
        inside = any(path == one or path.startswith(one + "/") for one in chosen)
        if not inside and os.path.exists("/before" + path):  # noqa: PTH110
            chosen.append(path)
    return chosen


def _bind(path: str) -> None:
    """Show a path of the world before, read-only."""
    before = "/before" + path
    if os.path.isdir(before):  # noqa: PTH112
        os.makedirs(path, exist_ok=True)  # noqa: PTH103
    else:
        os.makedirs(os.path.dirname(path), exist_ok=True)  # noqa: PTH103, PTH120
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))
    _mount(before, path, None, BIND | RECURSIVE)
    _set_read_only(path, recursive=True, devices=path in DEVICES)


def _set_read_only(path: str, *, recursive: bool, devices: bool = False) -> None:
    flags = READ_ONLY | NO_SUID | (0 if devices else NO_DEVICES)
    attributes = struct.pack("=QQQQ", flags, 0, 0, 0)
    result = libc.syscall(
        MOUNT_SETATTR, HERE, path.encode(), RECURSIVE_FLAG if recursive else 0,
        attributes, ctypes.c_size_t(len(attributes)),
    )  # fmt: skip
    check(result, f"mount of {path}")


def _mount(
    source: str | None, target: str, kind: str | None, flags: int, options: str | None = None
) -> None:
    def encoded(text: str | None) -> bytes | None:
        return None if text is None else text.encode()

    result = libc.mount(
        encoded(source), target.encode(), encoded(kind), ctypes.c_ulong(flags), encoded(options)
    )
    check(result, f"mount of {target}")
