"""Measure FSDP2 gradients reduced after each micro-batch, or once at the end of the step.

    OMP_NUM_THREADS=1 python benchmarks/loss/sharded_gradients.py [--rounds 5] [--quick]

Two ranks on gloo, on this machine: data is copied through local sockets, so the gain over a slow
network is larger than measured here. The memory of a rank is the same anywhere.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # harness

import torch
from harness import (
    MIB,
    RETURN_FREED,
    Table,
    alternated,
    parser,
    process_status,
    ratio,
    reported,
)
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from selfteach.models.fsdp import Shards
from selfteach.runtime.distributed import Ranks, init_ranks

EACH, ONCE = "after each", "at the end"
MICRO_BATCHES = 8
VARIANTS = (EACH, ONCE)


def model_of(quick: bool) -> LlamaForCausalLM:
    """Return a model of 7.9 million weights, of which 1 million are embedding and head."""
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
    """Return a call for the forward and backward passes of a step; gradients are then dropped."""
    assert ranks.mesh is not None
    model = model_of(quick)
    shards, sharded = Shards(model, ranks.mesh), model
    ids_BT = torch.randint(1, 64, (2, tokens), generator=torch.Generator().manual_seed(ranks.rank))

    def backward(variant: str) -> None:
        for number in range(MICRO_BATCHES):
            last = number == MICRO_BATCHES - 1
            sharded.set_requires_gradient_sync(variant == EACH or last)  # pyright: ignore
            hidden_BTH: Tensor = shards.hidden(ids_BT)
            (hidden_BTH @ model.lm_head.weight.T).logsumexp(-1).mean().backward()
        for weight in model.parameters():
            assert weight.grad is not None
            weight.grad = None

    return backward


def timed(ranks: Ranks, rounds: int, quick: bool, tokens: int) -> dict[str, float]:
    """Return the median seconds of each variant."""
    backward = gradients(ranks, quick, tokens)
    variants = {variant: partial(backward, variant) for variant in VARIANTS}
    return {n: t.median for n, t in alternated(variants, rounds=rounds).items()}


def peak(ranks: Ranks, variant: str, quick: bool, tokens: int) -> int:
    """Return the peak bytes of one step beyond the weight shards."""
    backward = gradients(ranks, quick, tokens)
    ranks.barrier()
    Path("/proc/self/clear_refs").write_text("5")
    before = process_status("VmRSS")
    backward(variant)
    return process_status("VmHWM") - before


def on_two(work: Callable[..., Any], *args: Any) -> Any:
    """Run ``work`` on two ranks; return the result of rank 0."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    started = [
        context.Process(target=_run, args=(rank, port, results, work, args)) for rank in range(2)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join()
        assert process.exitcode == 0
    return results.get()


def _run(rank: int, port: int, results: Any, work: Callable[..., Any], args: tuple) -> None:
    torch.set_num_threads(1)
    settings = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2,
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}  # fmt: skip
    os.environ.update({name: str(value) for name, value in settings.items()})
    with init_ranks("cpu", 120.0) as ranks:
        result = work(ranks, *args)
        if ranks.is_main:
            results.put(result)


def main() -> None:
    """Measure both variants."""
    args = parser(__doc__).parse_args()
    rounds = 1 if args.quick else args.rounds
    with reported(args) as tables:
        table = Table(f"Gradients of {MICRO_BATCHES} micro-batches in pieces on two ranks")
        tables.append(table)
        for tokens in (8,) if args.quick else (16,):
            seconds = on_two(timed, rounds, args.quick, tokens)
            os.environ.update(RETURN_FREED)  # freed memory must not count
            memory = {variant: on_two(peak, variant, args.quick, tokens) for variant in VARIANTS}
            for name in RETURN_FREED:  # mapping pages anew is slow
                del os.environ[name]
            for variant in VARIANTS:
                table.add(
                    tokens=2 * tokens, summed=variant, seconds=seconds[variant],
                    peak_MiB=memory[variant] / MIB,
                )  # fmt: skip
            table.add(
                tokens=2 * tokens, summed="ratio",
                seconds=ratio(seconds[ONCE], seconds[EACH]),
                peak_MiB=ratio(memory[ONCE], memory[EACH]),
            )  # fmt: skip


if __name__ == "__main__":
    main()
