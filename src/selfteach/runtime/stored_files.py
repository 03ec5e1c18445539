"""Read the files of run folders. Whatever is damaged in them is one `CheckpointError` of one line.

A file that ends in the middle of a line was cut off, by a kill or by a power cut: its writer had not
finished. Anything else that cannot be read is damage, and is never taken for an unfinished file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from selfteach.errors import CheckpointError

Row = dict[str, Any]


def read_bytes(path: Path) -> bytes | None:
    """Read a file; None if there is none. Raises `CheckpointError` if it cannot be read."""
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None


def read_json(path: Path) -> Row:
    """Read a JSON object. Raises `CheckpointError` if it is missing or damaged."""
    content = read_bytes(path)
    if content is None:
        raise CheckpointError(f"{path.parent} is no run folder: it has no {path.name}")
    return _json_object(content, str(path))


def read_lines(content: bytes, path: Path) -> tuple[list[Row], bool]:
    """Parse JSON lines; also return True if the last line is cut off, which is then left out.

    Raises `CheckpointError` for any other line that is no JSON object.
    """
    *lines, rest = content.split(b"\n")
    rows = [_json_object(line, f"{path}, line {n}") for n, line in enumerate(lines, 1)]
    return rows, bool(rest)


def read_metrics(path: Path) -> list[tuple[bytes, Row]]:
    """Read the whole lines of a metrics.jsonl: each as it is, and parsed; none if there is no file.

    Raises `CheckpointError` if one is damaged.
    """
    content = read_bytes(path)
    if content is None:
        return []
    rows, _ = read_lines(content, path)
    for number, row in enumerate(rows, 1):
        step, kind = row.get("step"), row.get("kind")
        if not (isinstance(step, int) and isinstance(kind, str)):
            raise CheckpointError(
                f"{path}, line {number} is damaged: no row of a step or evaluation"
            )
    return list(zip(content.split(b"\n"), rows, strict=False))


@contextmanager
def reading(path: Path | str) -> Iterator[None]:
    """Turn what a value of the wrong type or a missing field raises into one `CheckpointError`."""
    try:
        yield
    except (
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
        AssertionError,
        OSError,
        RecursionError,
    ) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise CheckpointError(f"{path} is damaged: {reason}") from error


def _json_object(content: bytes, where: str) -> Row:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is damaged: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{where} is damaged: it is no JSON object")
    return value
