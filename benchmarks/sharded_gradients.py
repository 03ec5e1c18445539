"""Gradients of a sharded step: summed over ranks after each micro-batch, or once at the end.

    OMP_NUM_THREADS=1 python benchmarks/sharded_gradients.py [--rounds 5] [--quick]

Two ranks on gloo, on this machine: what travels is copied through local sockets, so the gain of a slow
network is larger than what is measured here. What a rank holds is the same anywhere.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import _MALLOC, MIB, Table, _status, alternated, parser, ratio, reported
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from selfteach.models.fsdp import Shards
from selfteach.runtime.distributed import Ranks, init_ranks

EACH, ONCE = "after each", "at the end"
MICRO_BATCHES = 8
WAYS = (EACH, ONCE)


def model_of(quick: bool) -> LlamaForCausalLM:
    """7.9 million numbers, of which 1 are embedding and head."""
    hidden, layers, vocabulary = (32, 2, 64) if quick else (256, 8, 2048)
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
            num_attention_heads=4, num_key_value_heads=4, vocab_size=vocabulary,
            max_position_embeddings=256,
        )
    )  # fmt: skip


def gradients(ranks: Ranks, quick: bool, tokens: int) -> Callable[[str], None]:
    """A step's micro-batches, forth and back, whose gradients are then forgotten."""
    assert ranks.mesh is not None
    model = model_of(quick)
    shards, sharded = Shards(model, ranks.mesh), model
    ids_BT = torch.randint(1, 64, (2, tokens), generator=torch.Generator().manual_seed(ranks.rank))

    def backward(way: str) -> None:
        for number in range(MICRO_BATCHES):
            last = number == MICRO_BATCHES - 1
            sharded.set_requires_gradient_sync(way == EACH or last)  # pyright: ignore
            hidden_BTH: Tensor = shards.hidden(ids_BT)
            (hidden_BTH @ model.lm_head.weight.T).logsumexp(-1).mean().backward()
        for weight in model.parameters():
            assert weight.grad is not None
            weight.grad = None

    return backward


def timed(ranks: Ranks, rounds: int, quick: bool, tokens: int) -> dict[str, float]:
    """Median seconds of each way."""
    backward = gradients(ranks, quick, tokens)
    ways = {way: (lambda way=way: backward(way)) for way in WAYS}
    return {n: t.median for n, t in alternated(ways, rounds=rounds).items()}


def held(ranks: Ranks, way: str, quick: bool, tokens: int) -> int:
    """Bytes at the peak of one step beyond the pieces of the weights."""
    backward = gradients(ranks, quick, tokens)
    ranks.barrier()
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    backward(way)
    return _status("VmHWM") - before


def on_two(work: Callable[..., Any], *args: Any) -> Any:
    """What rank 0 of two says."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    said = context.SimpleQueue()
    started = [
        context.Process(target=_run, args=(rank, port, said, work, args)) for rank in range(2)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join()
        assert process.exitcode == 0
    return said.get()


def _run(rank: int, port: int, said: Any, work: Callable[..., Any], args: tuple) -> None:
    torch.set_num_threads(1)
    settings = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2,
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}  # fmt: skip
    os.environ.update({name: str(value) for name, value in settings.items()})
    with init_ranks("cpu", 120.0) as ranks:
        result = work(ranks, *args)
        if ranks.is_main:
            said.put(result)


def main() -> None:
    """Measure and print."""
    args = parser(__doc__).parse_args()
    rounds = 1 if args.quick else args.rounds
    with reported(args) as tables:
        table = Table(f"Gradients of {MICRO_BATCHES} micro-batches in pieces on two ranks")
        tables.append(table)
        for tokens in (8,) if args.quick else (16,):
            seconds = on_two(timed, rounds, args.quick, tokens)
            os.environ.update(_MALLOC)  # what is freed is gone, or it would count
            memory = {way: on_two(held, way, args.quick, tokens) for way in WAYS}
            for name in _MALLOC:  # and mapping pages takes long
                del os.environ[name]
            for way in WAYS:
                table.add(
                    tokens=2 * tokens,
                    weighted_loss=way,
                    seconds=seconds[way],
                    peak_MiB=memory[way] / MIB,
                )
            table.add(
                tokens=2 * tokens, weighted_loss="ratio",
                seconds=ratio(seconds[ONCE], seconds[EACH]),
                peak_MiB=ratio(memory[ONCE], memory[EACH]),
            )  # fmt: skip


if __name__ == "__main__":
    main()
