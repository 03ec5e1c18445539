"""Read distributed checkpoints without running what is in them.

torch writes a checkpoint's ``.metadata`` as a pickle, and a pickle can call anything. `ShardReader`
builds only the records that such a file consists of, and only those of tensors: other entries would be
unpickled by torch.
"""

from __future__ import annotations

import pickle
from typing import Any

import torch
from torch.distributed.checkpoint import metadata as records
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo

from selfteach.errors import CheckpointError

CLASSES: dict[tuple[str, str], Any] = {
    **{
        (records.__name__, name): getattr(records, name)
        for name in (
            "ChunkStorageMetadata", "TensorStorageMetadata", "Metadata", "MetadataIndex",
            "TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING",
        )
    },
    (_StorageInfo.__module__, "_StorageInfo"): _StorageInfo,
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): lambda name: {"torch.strided": torch.strided}[name],
    ("collections", "OrderedDict"): dict,
    ("pathlib", "PosixPath"): lambda *parts: "/".join(parts),
    ("pathlib", "WindowsPath"): lambda *parts: "/".join(parts),
}  # fmt: skip
"""What a ``.metadata`` may name, and what is built for it; dtypes besides."""


class _Records(pickle.Unpickler):
    """Builds the records of `CLASSES`, and refuses every other name."""

    def find_class(self, module: str, name: str) -> Any:
        """Return what a name stands for. Raises `pickle.UnpicklingError` for any other name."""
        if (module, name) in CLASSES:
            return CLASSES[module, name]
        value = getattr(torch, name, None) if module == "torch" else None
        if isinstance(value, torch.dtype):
            return value
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs")


class ShardReader(FileSystemReader):
    """Reads the shards of a checkpoint.

    Raises `CheckpointError` if its metadata are not a checkpoint's.
    """

    def read_metadata(self, *args: Any, **kwargs: Any) -> records.Metadata:
        """Return the checkpoint's metadata."""
        path = self._get_metadata_path(kwargs.get("rank"))
        try:
            with self.fs.create_stream(path, "rb") as file:
                metadata = _Records(file).load()
            if not isinstance(metadata, records.Metadata):
                raise pickle.UnpicklingError("it holds something else")
            for name, entry in metadata.state_dict_metadata.items():
                if not isinstance(entry, records.TensorStorageMetadata):
                    raise pickle.UnpicklingError(f"its entry {name!r} is no tensor")
        except Exception as error:  # a damaged pickle may raise anything
            raise CheckpointError(f"{path} is damaged or no checkpoint's: {error}") from None
        if metadata.storage_meta is None:
            metadata.storage_meta = records.StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata
