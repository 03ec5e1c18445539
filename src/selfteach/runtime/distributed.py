"""Divides work over ranks that torchrun has started, and combines their results.

Collectives are called in the same order on every rank and from one thread. With one rank none is
called, so that a single process computes bitwise the same with and without torchrun.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import Store
from torch.distributed.rendezvous import rendezvous

from selfteach.errors import EngineError, SelfteachError
from selfteach.runtime import torchrun

T = TypeVar("T")
Number = TypeVar("Number", int, float)

LOST_RANK_WORDS = ("gloo", "nccl", "closed by peer", "connection reset", "timed out", "broken pipe")
"""One of these is in torch's error message when another rank is lost."""
MUTEX_KEY, MUTEX_FREE, MUTEX_POLL_S = "selfteach/mutex", "free", 0.1
"""A key of the ranks' store that holds the mutex's owner, and how often to poll it."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """Describes this process among those that train together, and communicates with them.

    Example: of five batches on two ranks, rank 0 takes the first two, rank 1 the last three, and the
    gathered results have the order that one process would have given them.
    """

    rank: int = 0
    size: int = 1
    mesh: DeviceMesh | None = None
    """A one-dimensional mesh of all ranks, for sharding; None without torchrun."""
    store: Store | None = None
    """A key-value store that all ranks can use from any thread, in any order; None as above."""

    @property
    def is_main(self) -> bool:
        """Return True for the rank that prints and writes the files that are written once."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Return this rank's part: contiguous; sizes differ by one at most."""
        total = len(items)
        return items[total * self.rank // self.size : total * (self.rank + 1) // self.size]

    def gather(self, items: list[T]) -> list[T]:
        """Concatenate the lists of all ranks, in their order; the same result on every rank."""
        if self.size == 1:
            return items
        lists: list[list[T]] = [[] for _ in range(self.size)]
        dist.all_gather_object(lists, items)
        return [item for part in lists for item in part]

    def broadcast(self, value: T) -> T:
        """Return rank 0's value on every rank."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def any(self, flag: bool) -> bool:
        """Return True on every rank if the flag is true on any: for decisions that all must share."""
        return self._all_reduce(torch.tensor(float(flag)), dist.ReduceOp.MAX).item() > 0

    def sum(self, value: Number) -> Number:
        """Return the sum of a number over all ranks."""
        total = self._all_reduce(torch.tensor(value, dtype=torch.float64), dist.ReduceOp.SUM)
        return type(value)(total.item()) if self.size > 1 else value

    def mean(self, values_N: Tensor) -> float:
        """Return the mean over all ranks' entries, however many each has; 0 if there are none."""
        if self.size == 1:
            return values_N.mean().item() if len(values_N) else 0.0
        local = torch.stack([values_N.double().sum().cpu(), torch.tensor(len(values_N)).double()])
        total, count = self._all_reduce(local, dist.ReduceOp.SUM).tolist()
        return total / count if count else 0.0

    def max(self, values_N: Tensor) -> float:
        """Return the maximum of all ranks' entries, none of which is negative; 0 if there are none."""
        local = (
            values_N.max().double().cpu() if len(values_N) else torch.zeros((), dtype=torch.double)
        )
        return self._all_reduce(local, dist.ReduceOp.MAX).item()

    def sum_gradients(self, weights: Iterable[Tensor]) -> None:
        """Sum the gradients of replicated weights over ranks: summed, not averaged, since every loss
        includes the step's global denominators."""
        if self.size == 1:
            return
        weights = list(weights)
        if not self.any(any(weight.grad is not None for weight in weights)):
            return
        for weight in weights:
            if weight.grad is None:  # this rank had no sample
                weight.grad = torch.zeros_like(weight)
            dist.all_reduce(weight.grad)

    def all_or_raise(self, call: Callable[[], T]) -> T:
        """Return the result of a call once it has succeeded on all ranks. The call itself must use no
        collective.

        If it fails on one rank, all ranks raise that rank's message, so that none waits for it in a
        collective.
        """
        if self.size == 1:
            return call()
        result: list[T] = []
        local_error: SelfteachError | None = None
        try:
            result.append(call())
        except SelfteachError as error:
            local_error = error
        failures = self.gather([] if local_error is None else [str(local_error)])
        if local_error is not None:
            raise local_error
        if failures:
            raise EngineError(failures[0])
        return result[0]

    @contextmanager
    def mutex(self) -> Iterator[None]:
        """Run a block on one rank at a time, in one thread; uses no collective."""
        if self.store is None:
            yield
            return
        me = f"{self.rank}/{threading.get_ident()}"  # threads of one rank exclude each other too
        while self.store.compare_set(MUTEX_KEY, MUTEX_FREE, me).decode() != me:
            time.sleep(MUTEX_POLL_S)
        try:
            yield
        finally:
            self.store.set(MUTEX_KEY, MUTEX_FREE)

    def barrier(self) -> None:
        """Wait until all ranks have called this."""
        if self.size > 1:
            self.broadcast(None)
            self.sum(0)

    def _all_reduce(self, value: Tensor, how: dist.ReduceOp.RedOpType) -> Tensor:
        if self.size > 1:
            dist.all_reduce(value, op=how)
        return value


SINGLE_PROCESS = Ranks()
"""One process without torchrun: every collective returns at once."""


@contextmanager
def init_ranks(device: str, timeout_s: float) -> Iterator[Ranks]:
    """Join the process group that torchrun has started; yields `SINGLE_PROCESS` without torchrun.

    ``device`` is the kind of device that trains, ``"cpu"`` or ``"cuda"``; each rank takes the one
    with its local rank. Raises `EngineError` when another rank is lost, or does not reach a collective
    within ``timeout_s`` seconds.
    """
    if not torchrun.is_torchrun():
        yield SINGLE_PROCESS
        return
    if device == "cuda":
        torch.cuda.set_device(torchrun.local_rank())
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    try:
        timeout = timedelta(seconds=timeout_s)
        store, rank, size = next(rendezvous("env://", timeout=timeout))
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=size,
            timeout=timeout,
        )  # fmt: skip
        mesh = init_device_mesh(device, (size,))
        store.set(MUTEX_KEY, MUTEX_FREE)
        ranks = Ranks(rank, size, mesh, store)
        ranks.barrier()  # the mutex exists before any rank takes it
        yield ranks
    except RuntimeError as error:
        if not _lost_rank(error):
            raise
        raise EngineError(
            f"rank {torchrun.rank()}: another rank has ended, or has not responded for "
            f"{timeout_s:g} s (distributed.timeout_seconds); what is on disk stays there: fix the "
            "error of that rank, then start the same command again"
        ) from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _lost_rank(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or any(
        word in str(error).lower() for word in LOST_RANK_WORDS
    )
