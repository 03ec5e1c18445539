"""Reads rows of Hugging Face datasets: from the hub, its cache, or a local folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from selfteach.config.schema import nearest
from selfteach.errors import DataError
from selfteach.tasks.sources.source_row import Row, shortest


def read_hub(
    path: str, split: str, *, name: str | None, revision: str | None, streaming: bool
) -> Iterator[Row]:
    """Yield the rows of one split of a dataset. Raises `DataError`, in one line, if it cannot."""
    try:
        import datasets
    except ImportError:
        raise DataError(
            'data.type = "hub" needs Hugging Face datasets: pip install "selfteach[hub]"'
        ) from None
    saved = Path(path)
    if (saved / "dataset_dict.json").exists() or (saved / "state.json").exists():
        rows = _from_disk(datasets, path, split)
    else:
        rows = _load(datasets, path, split, name=name, revision=revision, streaming=streaming)
    schema = getattr(getattr(rows, "features", None), "arrow_schema", ())
    kinds = {field.name: field.type for field in schema}
    for number, values in enumerate(_fetched(rows, path), start=1):
        values = {name: shortest(value, kinds.get(name)) for name, value in values.items()}
        yield Row(values, f"{path} ({split}): row {number}", f"{split}-{number}")


def _fetched(rows: Any, path: str) -> Iterator[Mapping[str, Any]]:
    """Yield the rows. Raises `DataError` if they cannot be read on, as when the network fails."""
    remaining = iter(rows)
    while True:
        try:
            values = next(remaining)
        except StopIteration:
            return
        except Exception as error:  # streamed files are opened and parsed as they come
            raise DataError(f"data.path = {path!r}: {_explained(error)}") from None
        yield values


def _from_disk(datasets: Any, path: str, split: str) -> Any:
    """Load what ``save_to_disk`` wrote: several splits, or one without a name."""
    try:
        saved = datasets.load_from_disk(path)
    except Exception as error:  # a damaged folder raises what its parser does
        raise DataError(f"data.path = {path!r}: {_explained(error)}") from None
    if not isinstance(saved, Mapping):
        return saved
    if split not in saved:
        raise DataError(f"data.path = {path!r}: no split {split!r}; {nearest(split, list(saved))}")
    return saved[split]


def _load(datasets: Any, path: str, split: str, **settings: Any) -> Any:
    name = settings.pop("name")
    try:
        return datasets.load_dataset(path, name, split=split, **settings)
    except Exception as error:  # datasets and huggingface_hub raise a dozen kinds
        raise DataError(f"data.path = {path!r}: {_explained(error)}") from None


def _explained(error: Exception) -> str:
    """Summarise the library's error in one line, with the cause where it is recognised."""
    text = " ".join(str(error).split())
    text = text if len(text) <= 240 else text[:240] + "…"
    if isinstance(error, ConnectionError) or "Offline" in type(error).__name__ or "offline" in text:
        return (
            "not in the cache, and the hub cannot be reached "
            f"(HF_HUB_OFFLINE, or no network): {text}"
        )
    return f"cannot be loaded: {text}"
