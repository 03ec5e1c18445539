"""Reads text files as people have them: with a byte order mark, with CRLF, compressed."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TextIO

from selfteach.errors import DataError

OPENERS: dict[str, Callable[[Path], object]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
}
"""How compressed files are opened, by suffix."""
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")


@contextmanager
def open_text(path: Path, what: str, *, newline: str | None = None) -> Iterator[TextIO]:
    """Open a file of UTF-8 text, or of UTF-16 with a byte order mark, for reading.

    A byte order mark is no part of the text. Raises `DataError`, also for errors while the file is
    read; ``what`` names what is missing: a problem set.
    """
    try:
        with OPENERS.get(path.suffix, _open_plain)(path) as file:  # type: ignore[attr-defined]
            binary = io.BufferedReader(file)
            encoding = "utf-16" if binary.peek(2)[:2] in _UTF_16 else "utf-8-sig"
            with io.TextIOWrapper(binary, encoding=encoding, newline=newline) as text:
                yield text
    except FileNotFoundError:
        raise DataError(f"{path}: no such {what}") from None
    except (OSError, EOFError, UnicodeError, lzma.LZMAError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None


def read_text(path: Path, what: str = "problem set") -> str:
    """Return a file's text. Raises `DataError`."""
    with open_text(path, what) as file:
        return file.read()


def numbered_lines(path: Path, what: str = "problem set") -> Iterator[tuple[int, str]]:
    """Yield the lines of a file that are not blank, with their numbers from 1. Raises `DataError`.

    A line ends in a line feed, a carriage return or both, and nowhere else: a JSON string may hold
    U+2028 and its like, where str.splitlines would split too.
    """
    with open_text(path, what) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, line


def _open_plain(path: Path) -> BinaryIO:
    return path.open("rb")
