"""Many ranks, started by torchrun: who does which share, what is put together, and who talks.

Collectives are made in the same order on every rank and from one thread; none of them is made when
there is one rank, so that a process on its own computes what it always did, bit for bit.
"""

from __future__ import annotations

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

LOST = ("gloo", "nccl", "closed by peer", "connection reset", "timed out", "broken pipe")
"""Words, one of which stands in what torch says when another rank is gone."""
TURN, FREE, LOOK_EVERY_S = "selfteach/turn", "free", 0.1
"""A place in the ranks' store that says whose turn it is, and how often to look at it."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among those that train together.

    Example: five batches on two ranks; rank 0 takes the first two, rank 1 the last three, and what
    they make of them, gathered, has the order that one process would have given it.
    """

    rank: int = 0
    size: int = 1
    mesh: DeviceMesh | None = None
    """The ranks in a row, for sharding; None in a process that torchrun did not start."""
    store: Store | None = None
    """What all ranks can read and write from any thread, in no order; None as above."""

    @property
    def is_main(self) -> bool:
        """True for the rank that talks, and writes what is written once."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This rank's part: neighbours stay together, sizes differ by one at most."""
        total = len(items)
        return items[total * self.rank // self.size : total * (self.rank + 1) // self.size]

    def gather(self, own: list[T]) -> list[T]:
        """All ranks' lists, one after another; the same on every rank."""
        if self.size == 1:
            return own
        lists: list[list[T]] = [[] for _ in range(self.size)]
        dist.all_gather_object(lists, own)
        return [item for part in lists for item in part]

    def broadcast(self, value: T) -> T:
        """What rank 0 says, on every rank."""
        if self.size == 1:
            return value
        said = [value]
        dist.broadcast_object_list(said, src=0)
        return said[0]

    def any(self, flag: bool) -> bool:
        """True on every rank if it is true on one: for decisions that all must take alike."""
        return self._reduced(torch.tensor(float(flag)), dist.ReduceOp.MAX).item() > 0

    def sum(self, value: Number) -> Number:
        """A number added up over ranks."""
        total = self._reduced(torch.tensor(value, dtype=torch.float64), dist.ReduceOp.SUM)
        return type(value)(total.item()) if self.size > 1 else value

    def mean(self, values_N: Tensor) -> float:
        """The mean over all ranks' entries, however many each has; 0 where there are none."""
        if self.size == 1:
            return values_N.mean().item() if len(values_N) else 0.0
        own = torch.stack([values_N.double().sum().cpu(), torch.tensor(len(values_N)).double()])
        total, count = self._reduced(own, dist.ReduceOp.SUM).tolist()
        return total / count if count else 0.0

    def max(self, values_N: Tensor) -> float:
        """The largest of all ranks' entries, none of which is negative; 0 where there are none."""
        own = (
            values_N.max().double().cpu() if len(values_N) else torch.zeros((), dtype=torch.double)
        )
        return self._reduced(own, dist.ReduceOp.MAX).item()

    def sum_gradients(self, weights: Iterable[Tensor]) -> None:
        """Sum the gradients of weights that every rank holds whole: summed, not averaged, since
        every loss has the step's denominators in it."""
        if self.size == 1:
            return
        weights = list(weights)
        if not self.any(any(weight.grad is not None for weight in weights)):
            return
        for weight in weights:
            if weight.grad is None:  # this rank had nothing to learn from
                weight.grad = torch.zeros_like(weight)
            dist.all_reduce(weight.grad)

    def all_or_raise(self, call: Callable[[], T]) -> T:
        """What a call gives here, once it has ended well on all ranks. It makes no collective itself.

        Where it fails on one, all raise what that one says: nobody waits for a rank that has left.
        """
        if self.size == 1:
            return call()
        made: list[T] = []
        own: SelfteachError | None = None
        try:
            made.append(call())
        except SelfteachError as error:
            own = error
        failures = self.gather([] if own is None else [str(own)])
        if own is not None:
            raise own
        if failures:
            raise EngineError(failures[0])
        return made[0]

    @contextmanager
    def mutex(self) -> Iterator[None]:
        """A stretch in which one rank is at a time; no collective, so in any thread."""
        if self.store is None:
            yield
            return
        me = str(self.rank)
        while self.store.compare_set(TURN, FREE, me).decode() != me:
            time.sleep(LOOK_EVERY_S)
        try:
            yield
        finally:
            self.store.set(TURN, FREE)

    def wait(self) -> None:
        """Until all ranks are here."""
        if self.size > 1:
            self.broadcast(None)
            self.sum(0)

    def _reduced(self, value: Tensor, how: dist.ReduceOp.RedOpType) -> Tensor:
        if self.size > 1:
            dist.all_reduce(value, op=how)
        return value


SINGLE_PROCESS = Ranks()
"""A process on its own."""


@contextmanager
def joined(device: str, timeout_s: float) -> Iterator[Ranks]:
    """This process among the ranks that torchrun has started; alone where it has not.

    ``device`` is the kind of device that trains, ``"cpu"`` or ``"cuda"``; each rank takes the one
    with its local number. Raises `EngineError` when another rank is lost, or says nothing for
    ``timeout_s`` seconds.
    """
    if not torchrun.by_torchrun():
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
        store.set(TURN, FREE)
        ranks = Ranks(rank, size, mesh, store)
        ranks.wait()  # the turn is there before anybody takes it
        yield ranks
    except RuntimeError as error:
        if not _lost(error):
            raise
        raise EngineError(
            f"rank {torchrun.rank()}: another rank has ended, or has said nothing for "
            f"{timeout_s:g} s (distributed.timeout_seconds); what is on disk is kept: mend what that "
            "rank says, then start the same command again"
        ) from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _lost(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or any(word in str(error).lower() for word in LOST)
