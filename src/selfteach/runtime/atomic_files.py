"""Write files atomically and durably, and turn a full disk into one clear error.

A file is on disk when it has been flushed and its folder too: a rename that was not flushed is lost
with the power. What `write_text` and `atomic_path` have written is on disk when they return.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from selfteach.errors import CheckpointError

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""Errors of a full disk."""


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_lines(path: Path, rows: Any) -> None:
    """Write a JSON lines file atomically."""
    write_text(path, json_lines(rows))


def json_lines(rows: Iterable[Any]) -> str:
    """Return rows as JSON lines."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically. Raises `CheckpointError` if the disk is full."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def append_line(path: Path, line: str) -> None:
    """Append a line to a file, in one write, and flush it. Raises `CheckpointError` on a full disk."""
    with report_full_disk():
        is_new = not path.exists()
        with path.open("ab", buffering=0) as handle:
            handle.write(line.encode() + b"\n")
            os.fsync(handle.fileno())
        if is_new:
            sync_folder(path.parent)


@contextmanager
def atomic_path(path: Path, *, flushed: bool = True) -> Iterator[Path]:
    """Yield a temporary path that replaces ``path`` on leaving and is deleted on an error.

    Raises `CheckpointError` if the disk is full.
    """
    temporary = path.with_name(path.name + ".tmp")
    with report_full_disk():
        make_folder(path.parent)
        try:
            yield temporary
            if flushed:
                sync_file(temporary)
            temporary.replace(path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        if flushed:
            sync_folder(path.parent)


def make_folder(path: Path) -> None:
    """Create a folder and its parents, on disk when this returns."""
    new = []
    for folder in (path, *path.parents):
        if folder.exists():
            break
        new.append(folder)
    path.mkdir(parents=True, exist_ok=True)
    for folder in new:
        sync_folder(folder.parent)


def sync_file(path: Path) -> None:
    """Flush a file to disk."""
    with path.open("rb+") as handle:
        os.fsync(handle.fileno())


def sync_folder(path: Path) -> None:
    """Flush a folder's list of files to disk, where the system can."""
    if os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems
            raise
    finally:
        os.close(handle)


def sync_tree(path: Path) -> None:
    """Flush a folder with all that is in it."""
    for folder, _, files in os.walk(path):
        for name in files:
            sync_file(Path(folder, name))
        sync_folder(Path(folder))


@contextmanager
def report_full_disk() -> Iterator[None]:
    """Turn the error of a full or read-only disk into a `CheckpointError` of one line."""
    try:
        yield
    except OSError as error:
        remedy = "make room" if error.errno in FULL else "remove the cause"
        raise CheckpointError(
            f"cannot write {error.filename or 'the run folder'}: {error.strerror or error}; "
            f"nothing is lost: {remedy} and call selfteach resume"
        ) from error
    except SafetensorError as error:  # safetensors wraps the system's error
        raise CheckpointError(
            f"cannot write tensors into the run folder: {error}; "
            "nothing is lost: make room and call selfteach resume"
        ) from error
