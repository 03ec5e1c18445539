"""Reads rows of JSON and Parquet files, each with its location for error messages."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfteach.errors import DataError


@dataclass(frozen=True, slots=True)
class Row:
    """Holds one row of a source."""

    values: dict[str, Any]
    where: str
    """Location of the row for error messages: ``problems.jsonl:17``."""
    name: str
    """Place of the row: ``problems-17``."""


def read_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a ``.jsonl``, ``.json`` (one list) or ``.parquet`` file.

    Raises `DataError` naming the file, and the line if a single line is wrong.
    """
    match path.suffix:
        case ".jsonl":
            return _json_lines(path)
        case ".json":
            return _json_list(path)
        case ".parquet":
            return _parquet(path)
        case _:
            raise DataError(f"{path}: a problem set is a .jsonl, .json or .parquet file")


def _json_lines(path: Path) -> Iterator[Row]:
    # Lines end in \n alone: str.splitlines would also split at separators inside a JSON string.
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if line.strip():
            where = f"{path}:{number}"
            try:
                values = json.loads(line)
            except (ValueError, RecursionError):
                values = None
            yield Row(_table(values, where), where, f"{path.stem}-{number}")


def _json_list(path: Path) -> Iterator[Row]:
    try:
        rows = json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(rows, list):
        raise DataError(
            f"{path}: not a JSON list of problems; one object per line is a .jsonl file"
        )
    for number, values in enumerate(rows, start=1):
        where = f"{path}: row {number}"
        yield Row(_table(values, where), where, f"{path.stem}-{number}")


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    if not path.exists():
        raise DataError(f"{path}: no such problem set")
    try:
        with parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=1024):
                kinds = {field.name: field.type for field in batch.schema}
                for values in batch.to_pylist():
                    number += 1
                    values = {name: shortest(values[name], kinds[name]) for name in values}
                    yield Row(values, f"{path}: row {number}", f"{path.stem}-{number}")
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read as Parquet: {error}") from None


def shortest(value: Any, kind: object) -> Any:
    """Return a value of a column of narrow floats as the shortest number: 0.1, not 0.10000000149011612.

    ``kind`` is the column's Arrow type, or a type's name; lists and tables are changed within. Other
    types change nothing.
    """
    import numpy as np

    if isinstance(value, list) and hasattr(kind, "value_type"):
        return [shortest(element, kind.value_type) for element in value]
    if isinstance(value, dict) and hasattr(kind, "field"):
        return {name: shortest(element, kind.field(name).type) for name, element in value.items()}
    narrow = {
        "halffloat": np.float16,
        "float16": np.float16,
        "float": np.float32,
        "float32": np.float32,
    }
    if not isinstance(value, float) or str(kind) not in narrow:
        return value
    return float(str(narrow[str(kind)](value)))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # with or without a byte order mark
    except FileNotFoundError:
        raise DataError(f"{path}: no such problem set") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None


def _table(values: Any, where: str) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise DataError(f"{where}: not a JSON object")
    return values
