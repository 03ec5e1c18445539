"""Builds and installs a seccomp filter: the kernel refuses every system call that is not listed."""

from __future__ import annotations

import ctypes
import os
import platform
import struct

X86_64 = {
    "read": 0, "write": 1, "readv": 19, "writev": 20, "pread64": 17, "pwrite64": 18, "close": 3,
    "close_range": 436, "fstat": 5, "newfstatat": 262, "stat": 4, "lstat": 6, "statx": 332,
    "lseek": 8, "mmap": 9, "mprotect": 10, "munmap": 11, "mremap": 25, "madvise": 28, "brk": 12,
    "rt_sigaction": 13, "rt_sigprocmask": 14, "rt_sigreturn": 15, "rt_sigpending": 127,
    "rt_sigtimedwait": 128, "rt_sigsuspend": 130, "sigaltstack": 131, "access": 21,
    "faccessat": 269, "faccessat2": 439, "pipe": 22, "pipe2": 293, "select": 23, "pselect6": 270,
    "poll": 7, "ppoll": 271, "sched_yield": 24, "nanosleep": 35, "clock_nanosleep": 230,
    "clock_gettime": 228, "clock_getres": 229, "gettimeofday": 96, "time": 201, "getpid": 39,
    "gettid": 186, "getppid": 110, "getuid": 102, "getgid": 104, "geteuid": 107, "getegid": 108,
    "getresuid": 118, "getresgid": 120, "getgroups": 115, "uname": 63, "dup": 32, "dup2": 33,
    "dup3": 292, "getcwd": 79, "chdir": 80, "fchdir": 81, "open": 2, "openat": 257,
    "readlink": 89, "readlinkat": 267, "getdents64": 217, "unlink": 87, "unlinkat": 263,
    "rename": 82, "renameat": 264, "renameat2": 316, "ftruncate": 77, "truncate": 76, "fsync": 74,
    "fdatasync": 75, "flock": 73, "futex": 202, "set_robust_list": 273, "get_robust_list": 274,
    "rseq": 334, "arch_prctl": 158, "exit": 60, "exit_group": 231, "getrlimit": 97,
    "setrlimit": 160, "getrusage": 98, "times": 100, "sysinfo": 99, "getrandom": 318,
    "sched_getaffinity": 204, "sched_getparam": 143, "sched_getscheduler": 145, "membarrier": 324,
    "restart_syscall": 219, "statfs": 137, "fstatfs": 138, "umask": 95, "set_tid_address": 218,
    "getcpu": 309, "epoll_create1": 291, "epoll_create": 213, "epoll_ctl": 233, "epoll_wait": 232,
    "epoll_pwait": 281, "eventfd2": 290, "fadvise64": 221, "sendmsg": 46, "recvmsg": 47,
    "clone": 56, "clone3": 435, "kill": 62, "tgkill": 234, "prlimit64": 302, "ioctl": 16,
    "fcntl": 72,
}  # fmt: skip
AARCH64 = {
    "read": 63, "write": 64, "readv": 65, "writev": 66, "pread64": 67, "pwrite64": 68,
    "close": 57, "close_range": 436, "fstat": 80, "newfstatat": 79, "statx": 291, "lseek": 62,
    "mmap": 222, "mprotect": 226, "munmap": 215, "mremap": 216, "madvise": 233, "brk": 214,
    "rt_sigaction": 134, "rt_sigprocmask": 135, "rt_sigreturn": 139, "rt_sigpending": 136,
    "rt_sigtimedwait": 137, "rt_sigsuspend": 133, "sigaltstack": 132, "faccessat": 48,
    "faccessat2": 439, "pipe2": 59, "pselect6": 72, "ppoll": 73, "sched_yield": 124,
    "nanosleep": 101, "clock_nanosleep": 115, "clock_gettime": 113, "clock_getres": 114,
    "gettimeofday": 169, "getpid": 172, "gettid": 178, "getppid": 173, "getuid": 174,
    "getgid": 176, "geteuid": 175, "getegid": 177, "getresuid": 148, "getresgid": 150,
    "getgroups": 158, "uname": 160, "dup": 23, "dup3": 24, "getcwd": 17, "chdir": 49,
    "fchdir": 50, "openat": 56, "readlinkat": 78, "getdents64": 61, "unlinkat": 35,
    "renameat": 38, "renameat2": 276, "ftruncate": 46, "truncate": 45, "fsync": 82,
    "fdatasync": 83, "flock": 32, "futex": 98, "set_robust_list": 99, "get_robust_list": 100,
    "rseq": 293, "exit": 93, "exit_group": 94, "getrlimit": 163, "setrlimit": 164,
    "getrusage": 165, "times": 153, "sysinfo": 179, "getrandom": 278, "sched_getaffinity": 123,
    "sched_getparam": 121, "sched_getscheduler": 120, "membarrier": 283, "restart_syscall": 128,
    "statfs": 43, "fstatfs": 44, "umask": 166, "set_tid_address": 96, "getcpu": 168,
    "epoll_create1": 20, "epoll_ctl": 21, "epoll_pwait": 22, "eventfd2": 19, "fadvise64": 223,
    "sendmsg": 211, "recvmsg": 212, "clone": 220, "clone3": 435, "kill": 129, "tgkill": 131,
    "prlimit64": 261, "ioctl": 29, "fcntl": 25,
}  # fmt: skip
"""Numbers of the system calls that a single process of Python needs, by name."""
ARCHITECTURES = {"x86_64": (0xC000003E, X86_64), "aarch64": (0xC00000B7, AARCH64)}
"""Audit architecture and numbers, by machine."""
MESSAGES = ("sendmsg", "recvmsg")
"""Calls on sockets that exist; only the judge has one."""
IOCTLS = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)
"""TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX."""
FCNTLS = (0, 1, 2, 3, 4, 5, 6, 7, 1030, 1032)
"""Duplicates, flags and locks; no owner of signals, no size of a pipe."""
THREAD_FLAG = 0x10000
"""CLONE_THREAD."""

LOAD, EQUAL, GREATER_EQUAL, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
ALLOW, ERROR, KILL = 0x7FFF0000, 0x00050000, 0x80000000
EPERM, ENOSYS = 1, 38
NUMBER_OFFSET, ARCH_OFFSET = 0, 4
SECCOMP_MODE_FILTER, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 2, 22, 38


def instruction(code: int, value: int, true: int = 0, false: int = 0) -> bytes:
    """Return one BPF instruction; ``true`` and ``false`` are how many instructions it skips."""
    return struct.pack("=HBBI", code, true, false, value)


def build_filter(machine: str, process: int, *, messages: bool = False) -> bytes:
    """Return the BPF program for a process: the listed calls are allowed, others return EPERM.

    ``clone`` makes threads alone, and signals, limits, ``ioctl`` and ``fcntl`` are restricted by their
    arguments. ``clone3`` does not exist (ENOSYS), so that the C library falls back to ``clone``, whose
    flags a filter can read. ``messages`` allows calls on sockets that the process has. Raises
    `KeyError` for a machine whose numbers are not known.
    """
    arch, numbers = ARCHITECTURES[machine]
    refuse = instruction(RETURN, ERROR | EPERM)
    allow = instruction(RETURN, ALLOW)
    restricted: dict[str, bytes] = {
        "clone3": instruction(RETURN, ERROR | ENOSYS),
        "clone": _argument(0) + instruction(ANY_BIT, THREAD_FLAG, 0, 1) + allow + refuse,
        "kill": _one_of(0, (process,)),
        "tgkill": _one_of(0, (process,)),
        "prlimit64": _one_of(0, (0, process)),
        "ioctl": _one_of(1, IOCTLS),
        "fcntl": _one_of(1, FCNTLS),
    }
    program = instruction(LOAD, ARCH_OFFSET) + instruction(EQUAL, arch, 1, 0)
    program += instruction(RETURN, KILL) + instruction(LOAD, NUMBER_OFFSET)
    if machine == "x86_64":  # numbers of the x32 ABI
        program += instruction(GREATER_EQUAL, 0x40000000, 0, 1) + refuse
    for name, number in numbers.items():
        if name in MESSAGES and not messages:
            continue
        body = restricted.get(name, allow)
        program += instruction(EQUAL, number, 0, len(body) // 8) + body
    return program + refuse


def _argument(index: int) -> bytes:
    """Load the low half of an argument."""
    return instruction(LOAD, 16 + 8 * index)


def _one_of(index: int, values: tuple[int, ...]) -> bytes:
    """Allow a call if an argument has one of these values, and refuse it otherwise."""
    tests = b"".join(
        instruction(EQUAL, value, len(values) - at, 0) for at, value in enumerate(values)
    )
    refuse, allow = instruction(RETURN, ERROR | EPERM), instruction(RETURN, ALLOW)
    return _argument(index) + tests + refuse + allow


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def install(*, messages: bool = False) -> None:
    """Filter this process's system calls from now on, for good. Raises `OSError` if it cannot."""
    program = build_filter(platform.machine(), os.getpid(), messages=messages)
    libc = ctypes.CDLL(None, use_errno=True)
    buffer = ctypes.create_string_buffer(program, len(program))
    header = _Program(len(program) // 8, ctypes.addressof(buffer))
    for arguments in (
        (PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0),
        (PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(header), 0, 0),
    ):
        if libc.prctl(*arguments) != 0:
            code = ctypes.get_errno()
            raise OSError(code, f"seccomp: {os.strerror(code)}")
