"""Weights on disk for an engine in another process: a checkpoint, or an adapter as PEFT saves it."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from peft import PeftConfig
from safetensors.torch import save_file
from torch import Tensor

from selfteach.runtime.run_folder import enough_disk


class Handover:
    """Folders of weights below one folder, of which the newest is kept.

    An engine that was started again takes the newest once more, whatever the trainer does meanwhile.
    """

    def __init__(self, parent: Path, adapter: PeftConfig | None) -> None:
        self._parent, self._adapter = parent.absolute(), adapter

    def write(self, named_weights: Iterable[tuple[str, Tensor]], label: str) -> Path:
        """A folder with these weights, the only one left. Raises `CheckpointError` on a full disk."""
        target = self._parent / label
        with enough_disk():
            target.mkdir(parents=True, exist_ok=True)
            self._write(target, named_weights)
            for old in self._parent.iterdir():
                if old != target:
                    shutil.rmtree(old, ignore_errors=True)
        return target

    @property
    def adapters(self) -> bool:
        """True where it is adapters that train."""
        return self._adapter is not None

    def path(self, label: str) -> Path:
        """Where the weights of a label are."""
        return self._parent / label

    def _write(self, target: Path, named_weights: Iterable[tuple[str, Tensor]]) -> None:
        tensors = {name: value.detach().cpu().contiguous() for name, value in named_weights}
        if self._adapter is None:
            save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
            return
        # PEFT leaves out the adapter's name when it saves one.
        named = {name.replace(".default.", "."): value for name, value in tensors.items()}
        save_file(named, target / "adapter_model.safetensors", metadata={"format": "pt"})
        self._adapter.save_pretrained(str(target))
