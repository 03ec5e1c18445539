"""Calls NCCL itself: one communicator between the trainer and the workers of a server.

torch.distributed would need its own rendezvous at the other end, and cannot be given an id that another
program receives over HTTP. The functions and numbers are those of ``nccl.h``.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

UNIQUE_ID_BYTES = 128
INT8, FLOAT32, SUM = 0, 7, 0
"""Of ncclDataType_t and ncclRedOp_t; bytes of any kind travel as int8."""


class NcclError(Exception):
    """Is raised when a call of NCCL fails, or when there is no NCCL."""


class _UniqueId(ctypes.Structure):
    _fields_ = (("internal", ctypes.c_byte * UNIQUE_ID_BYTES),)


class NcclLibrary:
    """Loads the NCCL that this process's torch uses."""

    def __init__(self, load: Callable[[str], Any] = ctypes.CDLL) -> None:
        try:
            self._nccl = load("libnccl.so.2")
        except OSError as error:
            raise NcclError(f"NCCL cannot be loaded ({error})") from None

    def unique_id(self) -> bytes:
        """Return an id for one communicator, which all its ranks need."""
        unique = _UniqueId()
        self.call("ncclGetUniqueId", ctypes.byref(unique))
        return bytes(unique)

    def join(self, unique_id: bytes, size: int, device: torch.device) -> NcclGroup:
        """Return rank 0's end of a communicator; waits for the other ranks."""
        with torch.cuda.device(device):
            communicator = ctypes.c_void_p()
            unique = _UniqueId.from_buffer_copy(unique_id)
            self.call(
                "ncclCommInitRank", ctypes.byref(communicator), ctypes.c_int(size), unique,
                ctypes.c_int(0),
            )  # fmt: skip
            group = NcclGroup(self, communicator, device)
            group.warm_up()
        return group

    def call(self, function: str, *args: Any) -> None:
        """Call a function. Raises `NcclError` with NCCL's words."""
        status = getattr(self._nccl, function)(*args)
        if status != 0:
            describe = self._nccl.ncclGetErrorString
            describe.restype = ctypes.c_char_p
            raise NcclError(f"{function}: {describe(status).decode(errors='replace')}")


class NcclGroup:
    """Is rank 0 of a communicator."""

    def __init__(self, nccl: NcclLibrary, communicator: Any, device: torch.device) -> None:
        self._nccl, self._communicator, self.device = nccl, communicator, device
        self._stream = torch.cuda.Stream(device)

    def warm_up(self) -> None:
        """Sum one number over all ranks, as vLLM's workers do when they join."""
        with torch.cuda.stream(self._stream):
            one = torch.zeros(1, device=self.device)
            pointer = ctypes.c_void_p(one.data_ptr())
            self._nccl.call(
                "ncclAllReduce", pointer, pointer, ctypes.c_size_t(1), ctypes.c_int(FLOAT32),
                ctypes.c_int(SUM), self._communicator, ctypes.c_void_p(self._stream.cuda_stream),
            )  # fmt: skip
        self._stream.synchronize()

    def broadcast(self, bytes_B: Tensor, gone: Callable[[], None]) -> None:
        """Send bytes, which may be in host memory, to all other ranks.

        Calls ``gone`` again and again while it waits: it raises if the others are not there.
        """
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            sent_B = bytes_B.to(self.device)
            pointer = ctypes.c_void_p(sent_B.data_ptr())
            self._nccl.call(
                "ncclBroadcast", pointer, pointer, ctypes.c_size_t(len(sent_B)),
                ctypes.c_int(INT8), ctypes.c_int(0), self._communicator,
                ctypes.c_void_p(self._stream.cuda_stream),
            )  # fmt: skip
            event = torch.cuda.Event()
            event.record(self._stream)
        while not event.query():
            gone()

    def abort(self) -> None:
        """End the communicator, and what waits in it."""
        self._nccl.call("ncclCommAbort", self._communicator)
