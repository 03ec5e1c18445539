"""Flush files to disk in the background, in the order in which they were written."""

from __future__ import annotations

import functools
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from selfteach.runtime.atomic_files import report_full_disk, sync_file, sync_folder
from selfteach.runtime.checksums import Checksums


@functools.lru_cache(maxsize=1)
def _flusher(process: int) -> ThreadPoolExecutor:
    """Return the thread that flushes files in the order in which they were written.

    It is cached per process: a forked process does not inherit its parent's threads.
    """
    return ThreadPoolExecutor(1, "flush")


def flush_later(path: Path, checksums: Checksums, content: bytes) -> Future[None]:
    """Flush a file in the background and record its checksum; the future has the error, if any."""
    return _flusher(os.getpid()).submit(_flush, path, checksums, content)


def _flush(path: Path, checksums: Checksums, content: bytes) -> None:
    """Flush a file, then record its checksum. Raises `CheckpointError` if the disk is full."""
    with report_full_disk():
        try:
            sync_file(path)
        except FileNotFoundError:  # deleted in the meantime
            return
        sync_folder(path.parent)
    checksums.record(path, content)
