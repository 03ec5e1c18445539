"""Takes weights in memory inside a vLLM server: methods that vLLM adds to its worker class.

    vllm serve ... --worker-extension-cls selfteach.rollout.vllm.worker_extension.StreamedWeights

The server's environment needs this package, of which this file is used alone. The trainer calls the
methods through ``/collective_rpc``. Weights are collected beside those in use and loaded in one call,
so a transfer that is cut off leaves the server as it was. Replies are dictionaries: an ``error`` with
its ``kind``, or what was asked for.
"""

from __future__ import annotations

import base64
import hashlib
import json
import mmap
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

PROTOCOL = 1
"""Version of these methods' arguments; the trainer refuses another one."""
LOST, DAMAGED, REFUSED = "lost", "damaged", "refused"
"""Kinds of errors: the server was restarted in the middle; bytes differ from those that were sent; the
weights themselves are unsuitable."""
LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
SHARED_MEMORY = Path("/dev/shm")


class TransferError(Exception):
    """Is raised for a transfer that cannot go on, with its kind."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass
class StagedWeights:
    """Holds the weights of a transfer, as far as they have arrived."""

    manifest: str
    tensors: list[tuple[str, Tensor]]
    """Views of ``bytes_B``."""
    bytes_B: Tensor
    bucket: int
    """Bytes of a bucket; the last one may be shorter."""
    mapped: bool
    """True if the bytes are the trainer's own memory."""
    digests: dict[int, bytes] = field(default_factory=dict)

    @property
    def buckets(self) -> int:
        """Return how many buckets there are."""
        return -(-len(self.bytes_B) // self.bucket)

    def slice(self, index: int) -> Tensor:
        """Return the bytes of one bucket."""
        return self.bytes_B[index * self.bucket : (index + 1) * self.bucket]

    def require_complete(self, digest: str) -> None:
        """Raise `TransferError` unless all bytes are there, and are those that were sent."""
        if self.mapped:
            self.digests = {i: bucket_digest(self.slice(i)) for i in range(self.buckets)}
        missing = [i for i in range(self.buckets) if i not in self.digests]
        if missing:
            raise TransferError(DAMAGED, f"buckets {missing[:5]} have not arrived")
        if whole_digest(self.manifest, [self.digests[i] for i in range(self.buckets)]) != digest:
            raise TransferError(DAMAGED, "the weights have another checksum than those sent")


def bucket_digest(bytes_B: Tensor) -> bytes:
    """Return the checksum of a bucket."""
    buffer: Any = bytes_B.numpy()
    return hashlib.sha256(buffer).digest()


def whole_digest(manifest: str, digests: list[bytes]) -> str:
    """Return the checksum of names, dtypes and shapes, and of all buckets from theirs."""
    return hashlib.sha256(b"".join((manifest.encode(), *digests))).hexdigest()


def views(manifest: list[list[Any]], bytes_B: Tensor) -> list[tuple[str, Tensor]]:
    """Return the tensors that a manifest of (name, dtype, shape, offset) describes.

    Raises `TransferError` if one lies outside of the bytes, or if a dtype is unknown.
    """
    tensors = []
    for name, dtype_name, shape, offset in manifest:
        dtype = getattr(torch, str(dtype_name), None)
        if not isinstance(dtype, torch.dtype):
            raise TransferError(REFUSED, f"{name} has the unknown dtype {dtype_name!r}")
        size = dtype.itemsize
        for length in shape:
            size *= length
        if min([offset, *shape], default=0) < 0 or offset + size > len(bytes_B):
            raise TransferError(
                REFUSED,
                f"{name} of shape {list(shape)} is not within the {len(bytes_B)} bytes sent",
            )
        tensors.append((name, bytes_B[offset : offset + size].view(dtype).view(shape)))
    return tensors


def _replied(method: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """Return errors as replies: an exception could end a worker."""

    @wraps(method)
    def replying(self: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        try:
            return method(self, *args, **kwargs)
        except TransferError as error:
            return {"error": str(error), "kind": error.kind}
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}"[:300], "kind": REFUSED}

    return replying


class StreamedWeights:
    """Is added to the bases of vLLM's worker class, which has ``reload_weights``."""

    def selfteach_probe(self) -> dict[str, Any]:
        """Return that this server takes weights in memory."""
        return {"protocol": PROTOCOL}

    @_replied
    def selfteach_open(
        self, label: str, manifest: str, size: int, bucket: int, path: str
    ) -> dict[str, Any]:
        """Begin a transfer; earlier ones of the same run are dropped.

        ``path`` is that of the trainer's memory. Returns ``shared``: True if it can be mapped here, so
        that no bucket needs to be sent.
        """
        if not LABEL.fullmatch(label):
            raise TransferError(REFUSED, f"{label!r} is no label")
        staged = _staged(self)
        for other in [name for name in staged if run_of(name) == run_of(label)]:
            del staged[other]
        mapped = _mapped(path, size)
        bytes_B = torch.empty(size, dtype=torch.uint8) if mapped is None else mapped
        tensors = views(json.loads(manifest), bytes_B)
        staged[label] = StagedWeights(manifest, tensors, bytes_B, bucket, mapped is not None)
        return {"shared": mapped is not None}

    @_replied
    def selfteach_receive(self, label: str, index: int, digest: str, data: str) -> dict[str, Any]:
        """Take one bucket: its bytes in base64, and its checksum."""
        staged = _transfer(self, label)
        if staged.mapped:
            return {}
        target, received = staged.slice(index), base64.b64decode(data)
        if hashlib.sha256(received).hexdigest() != digest or len(received) != len(target):
            raise TransferError(DAMAGED, f"bucket {index} differs from the one that was sent")
        target.numpy()[:] = memoryview(received)
        staged.digests[index] = bytes.fromhex(digest)
        return {}

    @_replied
    def selfteach_commit(self, label: str, digest: str) -> dict[str, Any]:
        """Load the weights of a transfer in place of those in use."""
        staged = _transfer(self, label)
        try:
            staged.require_complete(digest)
            with torch.inference_mode():
                self.reload_weights(weights_iterator=iter(staged.tensors))  # type: ignore[attr-defined]
        finally:
            del _staged(self)[label]
        return {}

    @_replied
    def selfteach_commit_adapter(self, label: str, digest: str, config: str) -> dict[str, Any]:
        """Return a ``path`` of the adapter for vLLM, which loads adapters from files alone.

        The files are in this machine's memory where it has ``/dev/shm``. Those of earlier adapters of
        the same run are deleted.
        """
        staged = _transfer(self, label)
        try:
            staged.require_complete(digest)
            return {"path": str(_write_adapter(label, staged.tensors, config))}
        finally:
            del _staged(self)[label]


def run_of(label: str) -> str:
    """Return the run's part of a label."""
    return "-".join(label.split("-")[:2])


def _staged(worker: Any) -> dict[str, StagedWeights]:
    return worker.__dict__.setdefault("_selfteach_staged", {})


def _transfer(worker: Any, label: str) -> StagedWeights:
    staged = _staged(worker).get(label)
    if staged is None:
        raise TransferError(LOST, f"no transfer {label!r} has begun here")
    return staged


def _mapped(path: str, size: int) -> Tensor | None:
    """Return the trainer's memory, or None if it is not on this machine, or not open to this user."""
    if not path:
        return None
    try:
        descriptor = os.open(path, os.O_RDWR)
    except OSError:
        return None
    try:
        if os.fstat(descriptor).st_size < size:
            return None
        # Private: what a loader writes stays here. The trainer writes to its memory only once.
        return torch.frombuffer(
            mmap.mmap(descriptor, size, flags=mmap.MAP_PRIVATE), dtype=torch.uint8
        )
    except (OSError, ValueError):
        return None
    finally:
        os.close(descriptor)


def _write_adapter(label: str, tensors: list[tuple[str, Tensor]], config: str) -> Path:
    base = SHARED_MEMORY if os.access(SHARED_MEMORY, os.W_OK) else Path(tempfile.gettempdir())
    parent = base / f"selfteach-adapters-{os.getuid()}"
    parent.mkdir(mode=0o700, exist_ok=True)
    if parent.is_symlink() or parent.stat().st_uid != os.getuid():
        raise TransferError(REFUSED, f"{parent} belongs to another user")
    # Each worker of a server writes the same files; the last one that renames them wins.
    unfinished = Path(tempfile.mkdtemp(dir=parent, prefix="unfinished-"))
    save_file(dict(_cloned(tensors)), unfinished / "adapter_model.safetensors", {"format": "pt"})
    (unfinished / "adapter_config.json").write_text(config)
    target = parent / label
    try:
        unfinished.rename(target)
    except OSError:  # another worker was faster, or the adapter is loaded again
        shutil.rmtree(target, ignore_errors=True)
        unfinished.rename(target)
    for old in parent.iterdir():
        if old != target and run_of(old.name) == run_of(label):
            shutil.rmtree(old, ignore_errors=True)
    return target


def _cloned(tensors: list[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    return ((name, tensor.clone()) for name, tensor in tensors)
