"""Sends full weights from GPU to GPU through vLLM's own weight transfer (``backend = nccl``).

vLLM's workers join a communicator of which this process is rank 0. For each update they are sent
names, dtypes and shapes, and then bytes, in the pieces that vLLM's packed transfer expects. Between
``start`` and ``finish`` some of a server's weights are new: it is paused then, and has the label of
weights that are being loaded.
"""

from __future__ import annotations

import base64
import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, Protocol

import torch
from torch import Tensor

from selfteach.errors import EngineError
from selfteach.rollout.vllm.http_client import HttpClient, NotFound
from selfteach.rollout.vllm.nccl_library import NcclError, NcclLibrary
from selfteach.rollout.vllm.packed_weights import PackedWeights
from selfteach.rollout.vllm.vllm_engine import EngineUnavailable

START_WITH = (
    'start it with VLLM_SERVER_DEV_MODE=1 and --weight-transfer-config \'{"backend": "nccl"}\' '
    "(vLLM 0.32 or newer)"
)
PIECE_BYTES = 256 << 20
"""Bytes on the device beside the weights, at each end."""
POLL_S = 0.002
INITIAL_WEIGHT_VERSION = "default"
WHOLE_WEIGHTS = " NCCLWeightTransferEngine"
"""In the words of an engine that takes whole weights; vLLM's sparse one has a longer name."""


class Group(Protocol):
    """Is rank 0 of a communicator."""

    def broadcast(self, bytes_B: Tensor, gone: Callable[[], None]) -> None:
        """Send bytes to all other ranks; calls ``gone`` while it waits."""
        ...

    def abort(self) -> None:
        """End the communicator, and what waits in it."""
        ...


class Communicators(Protocol):
    """Makes communicators: NCCL, or what stands for it in tests."""

    def unique_id(self) -> bytes:
        """Return an id for one communicator."""
        ...

    def join(self, unique_id: bytes, size: int, device: torch.device) -> Group:
        """Return rank 0's end of a communicator; waits for the other ranks."""
        ...


class NcclTransfer:
    """Implements `WeightTransfer` with one communicator for each server."""

    name = "nccl"

    def __init__(
        self, device: torch.device, timeout_s: float,
        communicators: Callable[[], Communicators] | None = None,
    ) -> None:  # fmt: skip
        self._device, self._timeout_s = device, timeout_s
        self._communicators = communicators or NcclLibrary
        self._groups: dict[str, Group] = {}

    def stage(self, http: HttpClient, weights: PackedWeights) -> None:
        """Connect to a server that was started since the last time."""
        del weights
        version = http.get("/weight_info").get("weight_version")
        if http.url not in self._groups or version == INITIAL_WEIGHT_VERSION:
            self._groups.pop(http.url, None)
            self._groups[http.url] = self._connected(http)

    def apply(self, http: HttpClient, weights: PackedWeights) -> None:
        """Have the server receive the weights while this process sends them."""
        tensors = weights.tensors
        update = {
            "names": [name for name, _ in tensors],
            "dtype_names": [str(value.dtype).removeprefix("torch.") for _, value in tensors],
            "shapes": [list(value.shape) for _, value in tensors],
        }
        http.post("/pause", {})
        self._start(http)
        receiving = http.start_post("/update_weights", {"update_info": update})
        group = self._groups[http.url]
        try:
            values = weights.on_device or [value for _, value in tensors]
            self._broadcast(group, values, receiving)
            receiving.result()
        except (EngineError, EngineUnavailable, NcclError) as error:
            del self._groups[http.url]  # of no more use
            with contextlib.suppress(NcclError):  # the error before it is the cause
                group.abort()
            raise _typed(http, error) from None
        http.post("/finish_weight_update", {})
        http.post("/resume", {})

    def _start(self, http: HttpClient) -> None:
        """Begin an update; a server that refuses goes on with the weights that it has."""
        try:
            http.post("/start_weight_update", {})
        except (EngineError, EngineUnavailable) as error:
            with contextlib.suppress(EngineError, EngineUnavailable):
                http.post("/resume", {})
            if "already active" in str(error):
                raise EngineError(
                    f"engine: {http.url} is in the middle of a weight update, of another run or of one "
                    "that was killed: end the other run, or restart the server"
                ) from None
            raise

    def adapter_path(self, http: HttpClient, weights: PackedWeights, config: str) -> str:
        """Fail: adapters are small, and vLLM's transfer does not take them."""
        raise AssertionError((http.url, weights.label, config))

    def _broadcast(self, group: Group, tensors: Sequence[Tensor], receiving: Future[Any]) -> None:
        deadline = time.monotonic() + self._timeout_s

        def gone() -> None:
            if receiving.done() and receiving.exception() is not None:
                receiving.result()
            if time.monotonic() > deadline:
                raise EngineUnavailable(f"it received no weights within {self._timeout_s:g} s")
            time.sleep(POLL_S)

        for piece in pieces(tensors, PIECE_BYTES):
            gone_already = receiving.done() and receiving.exception() is not None
            if gone_already:
                receiving.result()
            group.broadcast(piece, gone)

    def _connected(self, http: HttpClient) -> Group:
        try:
            communicators = self._communicators()
            unique_id = communicators.unique_id()
        except NcclError as error:
            raise _typed(http, error) from None
        size = 1 + int(http.get("/get_world_size")["world_size"])
        joining: Future[Group] = Future()

        def join() -> None:
            try:
                joining.set_result(communicators.join(unique_id, size, self._device))
            except BaseException as error:
                joining.set_exception(error)

        threading.Thread(target=join, name="nccl", daemon=True).start()
        info = {
            "rank_offset": 1, "world_size": size, "packed": True,
            "packed_buffer_size_bytes": PIECE_BYTES, "packed_num_buffers": 2,
            "nccl_unique_id_b64": base64.b64encode(unique_id).decode(),
        }  # fmt: skip
        try:
            http.post("/init_weight_transfer_engine", {"init_info": info})
            return joining.result(self._timeout_s)
        except TimeoutError:
            raise EngineError(
                f"engine: NCCL does not connect to {http.url} within {self._timeout_s:g} s: both need "
                'GPUs of their own and a network between them; or set engine.weight_transfer = "stream"'
            ) from None
        except NcclError as error:
            raise _typed(http, error) from None


def accepts_nccl(http: HttpClient) -> bool:
    """Return True if a server was started with vLLM's weight transfer over NCCL.

    No address returns that, so its engine is given no settings, which it refuses in its words.
    """
    try:
        http.post("/init_weight_transfer_engine", {"init_info": {}})
    except NotFound:
        return False
    except EngineError as error:
        return WHOLE_WEIGHTS in str(error)
    return False


def pieces(tensors: Sequence[Tensor], piece_bytes: int) -> Iterator[Tensor]:
    """Yield the tensors' bytes as vLLM's packed transfer cuts them: after the tensor that exceeds."""
    waiting: list[Tensor] = []
    size = 0
    for tensor in tensors:
        bytes_B = tensor.contiguous().view(-1).view(torch.uint8)
        waiting.append(bytes_B)
        size += len(bytes_B)
        if size > piece_bytes:
            yield torch.cat(waiting)
            waiting, size = [], 0
    if waiting:
        yield torch.cat(waiting)


def _typed(
    http: HttpClient, error: EngineError | EngineUnavailable | NcclError
) -> EngineError | EngineUnavailable:
    if isinstance(error, NcclError):
        return EngineError(
            f"engine: weights cannot be sent to {http.url} over NCCL ({error}): both need GPUs of "
            'their own; or set engine.weight_transfer = "stream"'
        )
    return error
