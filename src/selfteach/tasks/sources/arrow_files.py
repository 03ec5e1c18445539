"""Reads rows of Arrow's tables: Parquet, IPC files and streams, folders of ``save_to_disk``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selfteach.errors import DataError
from selfteach.tasks.sources.source_row import Row, shortest

if TYPE_CHECKING:
    from pyarrow import RecordBatch


def read_parquet(path: Path) -> Iterator[Row]:
    """Yield the rows of a Parquet file. Raises `DataError`."""
    from pyarrow import parquet

    with _reading(path, "Parquet"), parquet.ParquetFile(path) as file:
        yield from _rows(path, file.iter_batches(batch_size=1024))


def read_arrow(path: Path) -> Iterator[Row]:
    """Yield the rows of an Arrow IPC file (also a Feather file) or stream. Raises `DataError`."""
    with _reading(path, "Arrow"):
        yield from _rows(path, _batches(path))


def is_saved_dataset(folder: Path) -> bool:
    """Return True for a folder of ``Dataset.save_to_disk`` or ``DatasetDict.save_to_disk``."""
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def read_saved_dataset(folder: Path, split: str) -> Iterator[Row]:
    """Yield the rows of a folder of ``save_to_disk``; of several splits, those of ``split``.

    Raises `DataError`, in one line, also for a split that the folder does not have.
    """
    if (folder / "dataset_dict.json").is_file():
        names = _json(folder / "dataset_dict.json", "splits")
        if split not in names and len(names) != 1:
            example = folder / (names[0] if names else "train")
            raise DataError(
                f"{folder}: no split {split!r}; it has {', '.join(map(repr, names))}: name one as a "
                f"folder, like {str(example)!r}"
            )
        folder = folder / (split if split in names else names[0])
    files = [folder / file["filename"] for file in _json(folder / "state.json", "_data_files")]
    with _reading(folder, "a dataset of save_to_disk"):
        yield from _rows(folder, (batch for path in files for batch in _batches(path)))


def _batches(path: Path) -> Iterator[RecordBatch]:
    import pyarrow as pa

    with pa.memory_map(str(path)) as source:
        is_file = source.read(6) == b"ARROW1"
        source.seek(0)
        if is_file:
            with pa.ipc.open_file(source) as file:
                yield from map(file.get_batch, range(file.num_record_batches))
        else:
            with pa.ipc.open_stream(source) as stream:
                yield from stream


def _rows(path: Path, batches: Iterator[RecordBatch]) -> Iterator[Row]:
    number = 0
    for batch in batches:
        kinds = {field.name: field.type for field in batch.schema}
        for start in range(0, batch.num_rows, 1024):
            for values in batch.slice(start, 1024).to_pylist():
                number += 1
                values = {name: shortest(values[name], kinds[name]) for name in values}
                yield Row(values, f"{path}: row {number}", f"{path.stem}-{number}")


def _json(path: Path, key: str) -> list[Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))[key]
    except (OSError, ValueError, KeyError, TypeError):
        values = None
    if not isinstance(values, list):
        raise DataError(f"{path}: cannot be read as a file of save_to_disk")
    return values


@contextmanager
def _reading(path: Path, kind: str) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except FileNotFoundError as missing:
        absent = path if not path.exists() else missing.filename or missing
        raise DataError(f"{absent}: no such problem set") from None
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path}: cannot be read as {kind}: {reason}") from None
