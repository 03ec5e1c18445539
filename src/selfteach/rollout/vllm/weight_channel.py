"""Brings the newest weights to the servers of an engine: in memory if they take them, or in a folder.

A transfer has two halves. ``stage`` brings the weights near, with no effect on what the server answers;
``apply`` puts them in place of the old ones. Between the two the server gets the label of weights that
are being loaded, so a transfer that is cut off is never taken for one that has ended.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from selfteach.config.engine_section import VllmServerConfig
from selfteach.errors import EngineError
from selfteach.rollout.vllm import nccl_transfer, weight_stream
from selfteach.rollout.vllm.http_client import HttpClient
from selfteach.rollout.vllm.nccl_transfer import NcclTransfer, accepts_nccl
from selfteach.rollout.vllm.packed_weights import PackedWeights
from selfteach.rollout.vllm.vllm_engine import EngineUnavailable
from selfteach.rollout.vllm.weight_stream import StreamTransfer, accepts_stream
from selfteach.rollout.vllm.weight_sync import WeightFolder, peft_names
from selfteach.runtime.distributed import SINGLE_PROCESS, Ranks

log = logging.getLogger("selfteach")

STORE_KEY = "selfteach/weight_transfer"
IN_WORDS = {
    "nccl": "from GPU to GPU over NCCL",
    "stream": "in memory, to the servers' worker extension",
    "folder": "through a folder (in memory: docs/vllm.md, engine.weight_transfer)",
}


class WeightTransfer(Protocol):
    """Brings weights in memory to one server at a time; may be used from several threads.

    Any method may raise `EngineUnavailable` or `EngineError`.
    """

    def stage(self, http: HttpClient, weights: PackedWeights) -> None:
        """Bring the weights near."""
        ...

    def apply(self, http: HttpClient, weights: PackedWeights) -> None:
        """Have the server use them."""
        ...

    def adapter_path(self, http: HttpClient, weights: PackedWeights, config: str) -> str:
        """Bring an adapter to the server; return its path there."""
        ...


class WeightChannel:
    """Holds the newest weights of a run, and sends them to any of its servers at any time.

    Rank 0 alone holds weights in memory; the other ranks wait until it has sent them.
    """

    def __init__(
        self,
        config: VllmServerConfig,
        folder: WeightFolder,
        ranks: Ranks = SINGLE_PROCESS,
        device: torch.device | None = None,
    ) -> None:
        self._config, self._folder, self._ranks = config, folder, ranks
        self._device = device or torch.device("cpu")
        self._kind: str | None = None
        self._transfer: WeightTransfer | None = None
        self._newest: PackedWeights | None = None

    @property
    def holds_adapters(self) -> bool:
        """Return True if the weights are those of a LoRA adapter, False if they are full weights."""
        return self._folder.holds_adapters

    @property
    def main_sends(self) -> bool:
        """Return True if a restarted server can get its weights from rank 0 alone."""
        return self._ranks.size > 1 and self.kind != "folder"

    @property
    def kind(self) -> str:
        """Return how weights travel, which is chosen at the first use.

        Raises `EngineUnavailable` while no server replies, `EngineError` if they cannot do what the
        recipe wants.
        """
        if self._kind is None:
            self._kind = self._kind_of_rank_0()
            self._transfer = self._made(self._kind)
        return self._kind

    @contextmanager
    def publishing(self, named: Sequence[tuple[str, Tensor]], label: str) -> Iterator[None]:
        """Hold new weights in place of older ones; within the block they are still on their device."""
        if self.kind == "folder":
            self._folder.write(named, label)
            yield
            return
        if self._newest is None or self._newest.label != label:
            self._newest = None  # frees the memory of the older ones
            named = list(peft_names(named)) if self.holds_adapters else named
            self._newest = PackedWeights(named, label)
            self._newest.on_device = [value.detach() for _, value in named]
        try:
            yield
        finally:
            self._newest.on_device = None

    def stage(self, http: HttpClient, label: str) -> None:
        """Bring the weights near a server; raises what `WeightTransfer` raises."""
        if self.kind != "folder":
            self._in_memory.stage(http, self._weights(label))

    def apply(self, http: HttpClient, label: str) -> None:
        """Have a server use the weights that were staged."""
        if self.kind != "folder":
            self._in_memory.apply(http, self._weights(label))
            return
        reload = {"weights_path": str(self._folder.path(label))}
        http.post("/collective_rpc", {"method": "reload_weights", "kwargs": reload})

    def adapter_path(self, http: HttpClient, label: str) -> str:
        """Return the path under which a server finds the adapter."""
        if self.kind == "folder":
            return str(self._folder.path(label))
        config = self._folder.adapter_config
        return self._in_memory.adapter_path(http, self._weights(label), config)

    @property
    def _in_memory(self) -> WeightTransfer:
        assert self._transfer is not None
        return self._transfer

    def _weights(self, label: str) -> PackedWeights:
        if self._newest is None or self._newest.label != label:
            if self._ranks.is_main:
                raise AssertionError(label)
            raise EngineUnavailable("it was restarted, and rank 0 has not sent it the weights yet")
        return self._newest

    def _kind_of_rank_0(self) -> str:
        store = self._ranks.store
        if not self._ranks.is_main and store is not None:
            return store.get(STORE_KEY).decode()
        kind = chosen(self._config, adapters=self.holds_adapters, device=self._device)
        if store is not None:
            store.set(STORE_KEY, kind)
        if self._config.weight_transfer == "auto":
            log.warning("engine: weights travel %s", IN_WORDS[kind])
        return kind

    def _made(self, kind: str) -> WeightTransfer | None:
        if kind == "nccl":
            return NcclTransfer(self._device, self._config.timeout_seconds)
        return StreamTransfer() if kind == "stream" else None


def chosen(config: VllmServerConfig, *, adapters: bool, device: torch.device) -> str:
    """Return how weights travel to all servers that reply: what the recipe wants, or the fastest.

    Raises `EngineUnavailable` if none replies, `EngineError` if one cannot do what the recipe wants.
    """
    wish = config.weight_transfer
    if wish == "folder":
        return wish
    if wish == "nccl" and adapters:
        raise EngineError(
            'engine.weight_transfer = "nccl" is for full weights: for adapters set "stream"'
        )
    if wish == "nccl" and device.type != "cuda":
        raise EngineError(
            'engine.weight_transfer = "nccl" needs a GPU that trains, and model.device is '
            f'{device.type}: set "stream"'
        )
    possible = []
    if wish in ("auto", "nccl") and device.type == "cuda" and not adapters:
        possible.append("nccl")
    if wish in ("auto", "stream"):
        possible.append("stream")
    unavailable: list[str] = []
    replying = []
    for member in config.members:
        http = HttpClient(member)
        try:
            possible = [kind for kind in possible if _accepts(http, kind, wish)]
            replying.append(member)
        except EngineUnavailable as error:
            unavailable.append(f"{member.address}: {error}")
    if not replying:
        raise EngineUnavailable("; ".join(unavailable))
    return possible[0] if possible else "folder"


def require_transfer(config: VllmServerConfig, *, adapters: bool) -> None:
    """Check one server for what the recipe wants. Raises `EngineError`, `EngineUnavailable`."""
    if config.weight_transfer in ("auto", "folder"):
        return
    has_cuda = torch.cuda.is_available()
    chosen(config, adapters=adapters, device=torch.device("cuda" if has_cuda else "cpu"))


def _accepts(http: HttpClient, kind: str, wish: str) -> bool:
    accepts = {"nccl": accepts_nccl, "stream": accepts_stream}[kind](http)
    if not accepts and wish == kind:
        start_with = {"nccl": nccl_transfer, "stream": weight_stream}[kind].START_WITH
        raise EngineError(
            f"engine: {http.url} does not accept weights in memory "
            f'(engine.weight_transfer = "{kind}"): '
            f'{start_with}, or set "auto"'
        )
    return accepts
