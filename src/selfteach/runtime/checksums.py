"""Checksums of what a run folder holds: ``checksums.jsonl``, a line per file that is on disk.

A line is appended once its file has been flushed, so a file that differs from its line is damaged and
not merely unfinished. A file that is written again gets a line without a checksum first.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from selfteach.errors import CheckpointError
from selfteach.runtime.atomic_files import append_line
from selfteach.runtime.stored_files import read_bytes


class Checksums:
    """Records and verifies the checksums of a folder's files; safe from any thread."""

    def __init__(self, folder: Path) -> None:
        self._folder, self.path = folder, folder / "checksums.jsonl"
        self._lock = threading.Lock()
        self._read_bytes = 0
        self._entries: dict[str, tuple[str, int]] = {}
        """SHA-256 and length by file."""

    def holds(self, path: Path) -> bool:
        """Return True if a file has a checksum."""
        with self._lock:
            self._refresh()
            return self._name(path) in self._entries

    def record(self, path: Path, content: bytes | None) -> None:
        """Record the content of a file that is on disk; None before the file is written again."""
        row: dict[str, object] = {"file": self._name(path), "sha256": None}
        if content is not None:
            row |= {"sha256": sha256(content), "bytes": len(content)}
        with self._lock:
            append_line(self.path, json.dumps(row))

    def verify(self, path: Path, content: bytes) -> bool:
        """Return True if a file has the recorded content, or none is recorded; False if it is shorter.

        Raises `CheckpointError` if it has another content.
        """
        with self._lock:
            self._refresh()
            entry = self._entries.get(self._name(path))
        if entry is None or entry[0] == sha256(content):
            return True
        if len(content) < entry[1]:
            return False
        raise CheckpointError(
            f"{path} is damaged: its checksum is not the one in {self.path.name}; restore it "
            "from a copy, or move it away to have it made again"
        )

    def _name(self, path: Path) -> str:
        return path.relative_to(self._folder).as_posix()

    def _refresh(self) -> None:
        """Read the lines that this process or another one has appended since the last call."""
        content = read_bytes(self.path) or b""
        if len(content) < self._read_bytes:  # another file stands there now
            self._entries, self._read_bytes = {}, 0
        whole = content.rfind(b"\n") + 1
        for line in content[self._read_bytes : whole].split(b"\n"):
            try:
                row = json.loads(line)
                self._entries.pop(row["file"], None)
                if row["sha256"] is not None:
                    self._entries[row["file"]] = (str(row["sha256"]), int(row["bytes"]))
            except (ValueError, KeyError, TypeError, RecursionError):
                continue  # empty, or cut off by a kill: that file is not vouched for
        self._read_bytes = max(self._read_bytes, whole)


def sha256(content: bytes) -> str:
    """Return the SHA-256 of bytes in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def file_checksums(paths: Iterable[Path]) -> dict[Path, str]:
    """Return the SHA-256 of files, computed in parallel.

    Raises `CheckpointError` if one cannot be read.
    """
    listed = list(paths)
    with ThreadPoolExecutor(4) as pool:
        return dict(zip(listed, pool.map(_file_checksum, listed), strict=True))


def _file_checksum(path: Path) -> str:
    try:
        with path.open("rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
