"""A double of a disk that loses its power: what was not flushed is gone.

`FlushedDisk` records what each fsync puts on disk: a file's content, or a folder's list of names. Files
and folders are told apart by their inodes, so renames are followed; a rename is on disk when its folder
has been flushed. `FlushedDisk.replay` writes what a machine would find after a power cut.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

File = dict[int, bytes]
Folder = dict[str, tuple[int, bool]]
"""Inode of each name, and whether it is a folder."""


class FlushedDisk:
    """Holds what is on disk below a root; the root itself is always there."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.files: File = {}
        self.folders: dict[int, Folder] = {root.stat().st_ino: {}}
        self.flushes = 0
        self._open: list[int] = []
        """Keeps inodes from being used again."""

    @contextmanager
    def recording(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[FlushedDisk]:
        """Record every flush in a block."""
        fsync = os.fsync

        def recorded(handle: int) -> None:
            fsync(handle)
            self.flushed(handle)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", recorded)
            try:
                yield self
            finally:
                for handle in self._open:
                    os.close(handle)
                self._open.clear()

    def flushed(self, handle: int) -> None:
        """Record what a flush puts on disk."""
        self.flushes += 1
        self._open.append(os.dup(handle))
        status, path = os.fstat(handle), Path(f"/proc/self/fd/{handle}").readlink()
        if stat.S_ISDIR(status.st_mode):
            with os.scandir(path) as entries:
                self.folders[status.st_ino] = {e.name: (e.inode(), e.is_dir()) for e in entries}
        elif path.exists():
            self.files[status.st_ino] = path.read_bytes()

    def replay(self, target: Path) -> None:
        """Write what is on disk now into a folder: files that were never flushed are empty."""
        self._replay(self.root.stat().st_ino, target)

    def _replay(self, inode: int, target: Path) -> None:
        target.mkdir(parents=True, exist_ok=True)
        for name, (child, is_folder) in self.folders.get(inode, {}).items():
            if is_folder:
                self._replay(child, target / name)
            else:
                (target / name).write_bytes(self.files.get(child, b""))
