"""Holds the newest weights in host memory, where a server of this machine can map them.

An engine that was restarted gets them again from here: the trainer's weights may be a step ahead.
"""

from __future__ import annotations

import json
import mmap
import os
import weakref
from collections.abc import Iterable
from functools import cached_property

import torch
from torch import Tensor

from selfteach.rollout.vllm.worker_extension import bucket_digest, views, whole_digest

BUCKET_BYTES = 32 << 20
"""Bytes that travel at a time."""
ALIGNMENT = 64
"""Bytes at whose multiples tensors begin."""


class PackedWeights:
    """Holds a copy of weights as the bytes that travel."""

    def __init__(
        self, named: Iterable[tuple[str, Tensor]], label: str, bucket: int = BUCKET_BYTES
    ) -> None:
        self.label, self.bucket = label, bucket
        self.on_device: list[Tensor] | None = None
        """The tensors themselves, in the same order, while they have not changed since."""
        weights = [(name, value.detach().contiguous()) for name, value in named]
        self._manifest, distinct, self.size = _layout(weights)
        self._bytes_B, self.path = _shareable_bytes(self.size, self)
        for offset, value in distinct.items():
            size = value.numel() * value.itemsize
            target = self._bytes_B[offset : offset + size]
            target.view(value.dtype).view(value.shape).copy_(value)

    @cached_property
    def manifest(self) -> str:
        """Return names, dtypes, shapes and offsets as JSON."""
        return json.dumps(self._manifest)

    @property
    def tensors(self) -> list[tuple[str, Tensor]]:
        """Return the weights."""
        return views(self._manifest, self._bytes_B)

    @property
    def buckets(self) -> int:
        """Return how many buckets there are."""
        return -(-self.size // self.bucket)

    def slice(self, index: int) -> Tensor:
        """Return the bytes of one bucket."""
        return self._bytes_B[index * self.bucket : (index + 1) * self.bucket]

    @cached_property
    def digests(self) -> list[bytes]:
        """Return the buckets' checksums."""
        return [bucket_digest(self.slice(i)) for i in range(self.buckets)]

    @cached_property
    def digest(self) -> str:
        """Return the checksum of all."""
        return whole_digest(self.manifest, self.digests)


def _layout(
    weights: list[tuple[str, Tensor]],
) -> tuple[list[list[object]], dict[int, Tensor], int]:
    """Return the manifest, the tensors by offset, and the size; a tied weight has one place."""
    manifest: list[list[object]] = []
    distinct: dict[int, Tensor] = {}
    places: dict[tuple[int, torch.dtype, torch.Size], int] = {}
    end = 0
    for name, value in weights:
        key = (value.data_ptr(), value.dtype, value.shape)
        if key not in places or value.numel() == 0:
            places[key] = end
            distinct[end] = value
            end += -(-value.numel() * value.itemsize // ALIGNMENT) * ALIGNMENT
        dtype = str(value.dtype).removeprefix("torch.")
        manifest.append([name, dtype, list(value.shape), places[key]])
    return manifest, distinct, max(end, ALIGNMENT)


def _shareable_bytes(size: int, owner: object) -> tuple[Tensor, str]:
    """Return memory, and the path under which another process of this user can map it ("" if none).

    It has no name in any folder and ends with this process, however that ends.
    """
    if not hasattr(os, "memfd_create"):
        return torch.empty(size, dtype=torch.uint8), ""
    descriptor = os.memfd_create("selfteach-weights")
    weakref.finalize(owner, os.close, descriptor)
    os.ftruncate(descriptor, size)
    memory = mmap.mmap(descriptor, size)
    return torch.frombuffer(memory, dtype=torch.uint8), f"/proc/{os.getpid()}/fd/{descriptor}"
