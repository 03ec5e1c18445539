"""Reads rows of files, each with its location for error messages: JSON, CSV, Parquet, Arrow."""

from __future__ import annotations

import ast
import csv
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from selfteach.errors import DataError
from selfteach.tasks.sources.arrow_files import (
    is_saved_dataset,
    read_arrow,
    read_parquet,
    read_saved_dataset,
)
from selfteach.tasks.sources.source_row import Row
from selfteach.tasks.sources.text_files import OPENERS, numbered_lines, open_text, read_text

KINDS = ".jsonl, .json, .csv, .tsv, .parquet or .arrow file, or a folder of save_to_disk"
"""What a source of problems may be, for error messages."""


def read_rows(path: Path, split: str = "train") -> Iterator[Row]:
    """Yield the rows of a file, or of a folder of ``save_to_disk``; the kind is told by the suffix.

    ``split`` is read from a folder with several. Raises `DataError` naming the file, and the line if a
    single line is wrong.
    """
    if path.is_dir():
        if is_saved_dataset(path):
            return read_saved_dataset(path, split)
        names = sorted(entry.name for entry in path.iterdir())
        raise DataError(
            f"{path}: a folder, and not one of save_to_disk: name the files in it; it holds "
            f"{', '.join(names[:8]) or 'nothing'}{', …' if len(names) > 8 else ''}"
        )
    reader = READERS.get(_kind(path))
    if reader is None:
        raise DataError(f"{path}: a problem set is a {KINDS}")
    return reader(path)


def is_problem_source(path: Path) -> bool:
    """Return True for a path that `read_rows` reads, by its suffix or by what the folder holds."""
    return _kind(path) in READERS or is_saved_dataset(path)


def _kind(path: Path) -> str:
    """Return the suffix that says the kind of a file: that before ``.gz``, where text is compressed."""
    if path.suffix.lower() in OPENERS:
        inner = path.with_suffix("").suffix.lower()
        return inner if inner in TEXT_KINDS else ""
    return path.suffix.lower()


def _json_lines(path: Path) -> Iterator[Row]:
    for number, line in numbered_lines(path):
        where = f"{path}:{number}"
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):
            values = None
        yield Row(_table(values, where), where, _name(path, number))


def _json(path: Path) -> Iterator[Row]:
    """Yield the rows of a JSON list, of a table with one, of pandas' columns, or of JSON lines."""
    try:
        rows = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # datasets and pandas write JSON lines under this suffix too
            yield from _json_lines(path)
            return
        raise DataError(f"{path}: not valid JSON: {error}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON: {error}") from None
    if isinstance(rows, dict):
        rows = _rows_of_table(rows)
    if not isinstance(rows, list):
        raise DataError(
            f"{path}: not a JSON list of problems; one object per line is a .jsonl file"
        )
    for number, values in enumerate(rows, start=1):
        where = f"{path}: row {number}"
        yield Row(_table(values, where), where, _name(path, number))


def _rows_of_table(table: Mapping[str, Any]) -> list[Any] | None:
    """Return the rows in a JSON object: its one list of objects, or pandas' columns; None otherwise."""
    lists = [value for value in table.values() if isinstance(value, list)]
    if len(lists) == 1 and lists[0] and all(isinstance(value, dict) for value in lists[0]):
        return lists[0]
    columns = list(table.values())
    if columns and all(isinstance(column, dict) for column in columns):
        indices = list(columns[0])
        if all(list(column) == indices for column in columns):
            return [{name: table[name][index] for name in table} for index in indices]
    if columns and len(lists) == len(columns) and len({len(column) for column in lists}) == 1:
        return [dict(zip(table, values, strict=True)) for values in zip(*lists, strict=True)]
    return None


def _csv(path: Path) -> Iterator[Row]:
    """Yield the rows of comma- or tab-separated values with a header; also of semicolons (Excel)."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    with open_text(path, "problem set", newline="") as file:
        header_line = file.readline()
        separator = "\t" if _kind(path) == ".tsv" else max(",;\t", key=header_line.count)
        lines = (line for lines in ([header_line], file) for line in lines)
        reader = csv.reader(lines, delimiter=separator, strict=True)
        header: list[str] = []
        number = 0
        try:
            header = next(reader, [])
            if repeated := [name for name, count in Counter(header).items() if count > 1]:
                raise DataError(f"{path}:1: two columns have the same name {repeated[0]!r}")
            for cells in reader:
                if not cells:
                    continue
                number += 1
                where = f"{path}:{reader.line_num}"
                if len(cells) != len(header):
                    raise DataError(f"{where}: {len(cells)} cells, the header has {len(header)}")
                values = {
                    name: _cell(cell, where) for name, cell in zip(header, cells, strict=True)
                }
                yield Row(values, where, _name(path, number), untyped=True)
        except csv.Error as error:
            raise DataError(f"{path}:{reader.line_num}: not valid CSV: {error}") from None


def _cell(cell: str, where: str) -> Any:
    """Return a cell's text, or the messages of a chat: pandas writes a list as Python or as JSON."""
    text = cell.strip()
    if not (text.startswith("[{") and "role" in text and "content" in text):
        return cell
    for read in (json.loads, ast.literal_eval):
        try:
            value = read(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        return value if isinstance(value, list) else cell
    raise DataError(
        f"{where}: a list of messages that cannot be read from CSV: write the file as JSON lines or "
        "Parquet"
    )


def _name(path: Path, number: int) -> str:
    return f"{path.stem}-{number}"


def _table(values: Any, where: str) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise DataError(f"{where}: not a JSON object")
    return values


TEXT_KINDS: Mapping[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
}
"""Readers of text, which may be compressed, by suffix."""
READERS: Mapping[str, Callable[[Path], Iterator[Row]]] = {
    **TEXT_KINDS,
    ".parquet": read_parquet,
    ".pq": read_parquet,
    ".arrow": read_arrow,
    ".arrows": read_arrow,
    ".ipc": read_arrow,
    ".feather": read_arrow,
}
"""Readers by suffix."""
