"""Stands for NCCL between a trainer and a scripted server: a queue of bytes for each communicator."""

from __future__ import annotations

import base64
import queue
from collections.abc import Callable

import torch
from torch import Tensor

from selfteach.rollout.vllm.nccl_library import UNIQUE_ID_BYTES


class ScriptedGroup:
    """Is both ends of a communicator."""

    def __init__(self, piece_bytes: int) -> None:
        self.piece_bytes = piece_bytes
        self.aborted, self.pieces = False, 0
        self._queue: queue.Queue[Tensor] = queue.Queue(1)

    def broadcast(self, bytes_B: Tensor, gone: Callable[[], None]) -> None:
        self.pieces += 1
        while True:
            try:
                self._queue.put(bytes_B, timeout=0.01)
                return
            except queue.Full:
                gone()

    def receive(self, size: int) -> Tensor:
        piece = self._queue.get(timeout=10)
        assert len(piece) == size, "both ends cut the stream at the same places"
        return piece

    def abort(self) -> None:
        self.aborted = True


class ScriptedNccl:
    """Makes communicators; servers find them by id."""

    def __init__(self, piece_bytes: int) -> None:
        self.groups: dict[str, ScriptedGroup] = {}
        self._piece_bytes, self._ids = piece_bytes, 0

    def unique_id(self) -> bytes:
        self._ids += 1
        unique_id = bytes([self._ids]) * UNIQUE_ID_BYTES
        key = base64.b64encode(unique_id).decode()
        self.groups[key] = ScriptedGroup(self._piece_bytes)
        return unique_id

    def join(self, unique_id: bytes, size: int, device: torch.device) -> ScriptedGroup:
        assert size == 2 and device.type == "cuda"
        return self.groups[base64.b64encode(unique_id).decode()]
