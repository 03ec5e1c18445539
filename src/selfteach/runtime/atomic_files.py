"""Write files atomically, and turn a full disk into one clear error."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from selfteach.errors import CheckpointError

UNWRITABLE = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR,
    errno.ENOENT,
}  # fmt: skip
"""Errors of a full disk, a read-only file system or an impossible path."""


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file. Raises `CheckpointError` if it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} is no run folder: it has no {path.name}") from None
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None


def write_lines(path: Path, rows: Any) -> None:
    """Write a JSON lines file atomically."""
    write_text(path, json_lines(rows))


def json_lines(rows: Iterable[Any]) -> str:
    """Return rows as JSON lines."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def read_lines(path: Path) -> list[dict[str, Any]] | None:
    """Read a JSON lines file; None if there is no such file, or it is truncated."""
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically. Raises `CheckpointError` if the disk is full."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def atomic_path(path: Path, *, flushed: bool = True) -> Iterator[Path]:
    """Yield a temporary path that replaces ``path`` on leaving and is deleted on an error.

    Raises `CheckpointError` if the disk is full.
    """
    temporary = path.with_name(path.name + ".tmp")
    with report_full_disk():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            if flushed:
                with temporary.open("rb+") as handle:
                    os.fsync(handle.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


@contextmanager
def report_full_disk() -> Iterator[None]:
    """Turn the error of a full or read-only disk into a `CheckpointError` of one line."""
    try:
        yield
    except OSError as error:
        if error.errno in UNWRITABLE:
            raise CheckpointError(
                f"cannot write {error.filename or 'the run folder'}: {error.strerror}; "
                "nothing is lost: make room and call selfteach resume"
            ) from error
        raise
    except SafetensorError as error:  # safetensors wraps the system's error
        raise CheckpointError(
            f"cannot write tensors into the run folder: {error}; "
            "nothing is lost: make room and call selfteach resume"
        ) from error


def require_empty(path: Path) -> None:
    """Raise `CheckpointError` if a new run's folder is a file or is not empty."""
    if path.is_file():
        raise CheckpointError(f"--out {path} is a file; name a new or an empty folder")
    if path.is_dir() and any(child.name != ".lock" for child in path.iterdir()):
        raise CheckpointError(f"--out {path} is not empty; name a new or an empty folder")
