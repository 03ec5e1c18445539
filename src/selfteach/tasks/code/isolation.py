"""Chooses how answers are isolated, by what this machine has, and proves that the isolation holds."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from selfteach.config.code_section import Isolation
from selfteach.errors import DataError

AUTOMATIC: tuple[Isolation, ...] = ("bubblewrap", "namespaces", "landlock")
"""Isolations that ``auto`` tries, in this order."""
MACHINES = ("x86_64", "aarch64")
FOLDER = Path(__file__).parent
SCRATCH = "/scratch"
"""The scratch folder inside a namespace."""
WRITABLE = ("/tmp", "/dev", "/dev/shm")
"""Folders outside the scratch folder that users, or their own namespaces, can mostly write to."""
PROBE = """
import os

def probe(path, folders):
    done = []

    def attempt(name, action):
        try:
            action()
        except OSError:
            return
        except ImportError:
            return
        done.append(name)

    def connect():
        import _socket
        _socket.socket()

    attempt("read a file", lambda: open(path).close())
    def write(path):
        open(path, "w").close()
        os.remove(path)

    for folder in folders:
        attempt("write a file in " + folder, lambda: write(folder + "/selfteach_probe"))
    attempt("open a socket", connect)
    attempt("start a process", lambda: os.fork() or os._exit(0))
    attempt("run a program", lambda: os.execv("/bin/true", ["true"]))
    return done
"""
"""Code that returns what an isolated process should not be able to do, and could."""


def candidates(requested: Isolation) -> tuple[Isolation, ...]:
    """Return the isolations to try. Raises `DataError`, in one line, where none can work."""
    if sys.platform != "linux" or platform.machine() not in MACHINES:
        raise DataError(
            f'data.verifier = "code" needs Linux on {" or ".join(MACHINES)} to isolate answers; this '
            f"is {sys.platform} on {platform.machine()}"
        )
    return AUTOMATIC if requested == "auto" else (requested,)


def refusal(requested: Isolation, reasons: Mapping[str, str]) -> DataError:
    """Build the error for a machine where no isolation works that the recipe accepts."""
    why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    return DataError(
        f'data.code.isolation = "{requested}": answers cannot be isolated here ({why}): install '
        "bubblewrap, allow user namespaces, or use a kernel with Landlock (6.2 or later); "
        'isolation = "rlimits" would run them with the rights of this user'
    )


def settings(isolation: Isolation, scratch: str) -> dict[str, Any]:
    """Return what a supervisor needs to isolate answers. Raises `DataError` if bwrap is not there."""
    executable = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
    readable = _readable()
    wrapper: list[str] = []
    if isolation == "bubblewrap":
        program = shutil.which("bwrap")
        if program is None:
            raise DataError("bwrap is not installed")
        wrapper = bubblewrap(program, [*readable, executable, str(FOLDER / "sandbox")])
    return {
        "isolation": isolation,
        "readable": readable,
        "scratch": scratch,
        "folder": str(FOLDER),
        "wrapper": wrapper,
        # -P -s -S: neither the working folder, nor the user's packages, nor site-packages.
        "python": [executable, "-P", "-s", "-S", "-B", "-X", "utf8"],
        # One order of sets in every process, so that a verdict does not depend on the process.
        "environment": {"PYTHONHASHSEED": "0", "LC_ALL": "C.UTF-8"},
    }


def _readable() -> list[str]:
    """Return the paths that Python needs to import its standard library, and nothing else."""
    names = ("stdlib", "platstdlib")
    paths = [sysconfig.get_path(name) for name in names]
    paths += [sysconfig.get_config_var("LIBDIR") or "", "/usr/lib", "/usr/lib64", "/lib", "/lib64"]
    paths += ["/usr/share/zoneinfo", "/etc/localtime", "/etc/ld.so.cache"]
    return sorted({os.path.realpath(path) for path in paths if path and Path(path).exists()})


def bubblewrap(program: str, readable: Sequence[str]) -> list[str]:
    """Return the command that runs another with nothing but these paths, read-only."""
    command = [
        program, "--unshare-all", "--die-with-parent", "--new-session",
        "--cap-add", "CAP_SYS_ADMIN",  # of its own user namespace, for a process namespace per answer
        "--proc", "/proc", "--dev", "/dev", "--dir", SCRATCH,
    ]  # fmt: skip
    outermost: list[str] = []
    for path in sorted(set(readable)):
        if not any(path == one or path.startswith(one + "/") for one in outermost):
            outermost.append(path)
    for path in outermost:
        command += ["--ro-bind", path, path]
    for link in ("/lib", "/lib64"):
        if Path(link).is_symlink():
            command += ["--symlink", str(Path(link).readlink()), link]
    # Of the devices only the nodes are bound; /dev and /dev/shm are files in memory, mounted apart.
    return [*command, "--remount-ro", "/dev", "--remount-ro", "/", "--chdir", "/", "--"]


def probe_request(limits: Mapping[str, Any]) -> dict[str, Any]:
    """Return a request whose outcome is ``passed`` if an answer can do nothing that it should not."""
    case = {"call": "probe", "args": ["/etc/passwd", [*WRITABLE]], "expected": []}
    return {"tests": {"shape": "cases", "cases": [case]}, "code": PROBE, "limits": dict(limits)}
