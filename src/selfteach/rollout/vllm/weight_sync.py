"""Writes weights to disk for an engine in another process: a checkpoint or a PEFT adapter."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from peft import PeftConfig
from safetensors.torch import save_file
from torch import Tensor

from selfteach.runtime.atomic_files import report_full_disk


class WeightFolder:
    """Holds the newest weights on disk, in a folder named by their label.

    They stay there until the next ones are written: an engine that was restarted reads them again.
    """

    def __init__(self, parent: Path, adapter: PeftConfig | None) -> None:
        self._parent, self._adapter = parent.absolute(), adapter

    def write(self, named_weights: Iterable[tuple[str, Tensor]], label: str) -> Path:
        """Write the weights, delete older ones, and return the new folder.

        Raises `CheckpointError` if the disk is full.
        """
        target = self._parent / label
        with report_full_disk():
            target.mkdir(parents=True, exist_ok=True)
            self._write(target, named_weights)
            for old in self._parent.iterdir():
                if old != target:
                    shutil.rmtree(old, ignore_errors=True)
        return target

    @property
    def holds_adapters(self) -> bool:
        """Return True if the weights are those of a LoRA adapter, False if they are full weights."""
        return self._adapter is not None

    @property
    def adapter_config(self) -> str:
        """Return the adapter's settings as PEFT writes them, in JSON."""
        assert self._adapter is not None
        with tempfile.TemporaryDirectory() as folder:
            self._adapter.save_pretrained(folder)
            (path,) = Path(folder).glob("*.json")
            return json.dumps(json.loads(path.read_text()))

    def path(self, label: str) -> Path:
        """Return the folder of the weights with this label."""
        return self._parent / label

    def _write(self, target: Path, named_weights: Iterable[tuple[str, Tensor]]) -> None:
        if self._adapter is None:
            save_file(
                _separate(named_weights), target / "model.safetensors", metadata={"format": "pt"}
            )
            return
        named = _separate(peft_names(named_weights))
        save_file(named, target / "adapter_model.safetensors", metadata={"format": "pt"})
        self._adapter.save_pretrained(str(target))


def peft_names(named_weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Return weights under the names in PEFT's files, which leave out that of the adapter."""
    return ((name.replace(".default.", "."), value) for name, value in named_weights)


def _separate(named_weights: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Return tensors in host memory, of which no two share it, as safetensors needs them."""
    tensors: dict[str, Tensor] = {}
    places: set[int] = set()
    for name, value in named_weights:
        value = value.detach().cpu().contiguous()
        tensors[name] = value.clone() if value.data_ptr() in places else value
        places.add(value.data_ptr())
    return tensors
