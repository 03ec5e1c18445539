"""One training step beside TRL's SDPO and GRPO trainers on a GPU, on the lab's base and known shapes.

    python benchmarks/training_step_gpu.py [--models ...] [--json FILE]     (in .venv-bench)

What is compared, and how it is made the same, says `training_ways`. Of models with random weights
(`random_models`) answers and contexts are given to both. Phases wait for the device, and peaks are the
allocator's. `--chunks 23 26` adds our step with so many logits (powers of two) in existence at a time.
"""

from __future__ import annotations

import argparse
import gc
import warnings
from typing import Any

import torch
from harness import MIB, Table, on_device, parser, ratio, reported
from random_models import SIZED
from step_clock import PHASES, Clock
from training_ways import BF16, KINDS, Again, Ours, Theirs

from selfteach.config.schema import merge

PRECISIONS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bf16": BF16,
    "bf16 weights": {"model": {"weights_dtype": "bfloat16"}},
}
"""On CUDA: what weights and products are in; TRL's are set alike."""


def main() -> None:
    """The lab's model and shapes with random weights."""
    made = parser(__doc__)
    made.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="cpu: a check"
    )
    listed = ["lab", *SIZED]
    made.add_argument("--models", nargs="*", choices=listed, default=listed[:2])
    made.add_argument("--kinds", nargs="*", choices=KINDS)
    made.add_argument("--precisions", nargs="*", choices=PRECISIONS)
    made.add_argument("--chunks", nargs="*", type=int, default=[], help="top-K and grpo")
    args = made.parse_args()
    args.device = on_device(args.device)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with reported(args) as tables:
        measure(args, tables)


def compare(table: Table, model: str, kind: str, precision: str, args: argparse.Namespace) -> None:
    """One line for each of the two, and for ours with other chunks."""
    where = {"model": {"device": args.device}}
    clocks = {"ours": Clock(), "TRL": Clock()}
    ours = Ours(model, kind, clocks["ours"], merge(where, PRECISIONS[precision]))
    failed: dict[str, str] = {}
    own = args.chunks if kind in ("top-K", "grpo") else []  # others may have kernels of their own
    again = {f"ours, 2^{n} logits": Again(ours, Clock(), 2**n) for n in own}
    clocks |= {who: other.clock for who, other in again.items()}
    try:
        theirs = Theirs(model, kind, clocks["TRL"], ours, args.rounds + 1, args.device, precision)
        theirs.others += again.values()
        theirs.trainer.train()
    except torch.cuda.OutOfMemoryError as error:
        failed["TRL"] = f"out of memory: {str(error).splitlines()[0][:100]}"
        theirs = None
        gc.collect()
        torch.cuda.empty_cache()
        alone(ours, list(again.values()), args.rounds + 1)
    said = {who: clock.medians() for who, clock in clocks.items() if len(clock.steps) > 1}
    for who in clocks:
        row = said.get(who, {}) if who not in failed else {}
        base = said.get("ours", {})
        table.add(
            model=model, precision=precision, kind=kind, who=who, step=row.get("step"),
            **{phase: row.get(phase) for phase in PHASES},
            rest=row["step"] - sum(row.get(p, 0.0) for p in PHASES) if row else None,
            **{"times ours": ratio(row.get("step"), base.get("step"))},
            **{"without sampling": ratio(
                row["step"] - row.get("sampling", 0.0), base["step"] - base.get("sampling", 0.0)
            ) if row and base else None},
            peak_MiB=clocks[who].peak / MIB if row else None,
            failed=failed.get(who),
        )  # fmt: skip


def alone(ours: Ours, others: list[Again], steps: int) -> None:
    """Ours without TRL's, which did not fit."""
    for one in (ours, *others):
        one.clock.steps.clear()
        for _ in range(steps):
            one.step()


def measure(args: argparse.Namespace, tables: list[Table]) -> None:
    """All that is asked for."""
    tables.append(table := Table("A training step on a GPU, seconds"))
    table.notes = (
        "`times ours` above 1: slower than ours. Of a model with random weights answers and "
        "contexts are given to both, and nobody samples. bf16: float32 weights under autocast. "
        "`peak_MiB`: the most that a step held beyond weights, moments and teachers."
    )
    torch.cuda.is_available() and torch.cuda.init()
    quick = ["tiny, random weights"]
    for model in quick if args.quick else args.models:
        precisions = ["bf16 weights"] if model.startswith("Qwen") else ["bf16", "float32"]
        for precision in args.precisions or precisions:
            for kind in args.kinds or ("full", "top-K", "sampled", "grpo"):
                compare(table, model, kind, precision, args)
                gc.collect()
                torch.cuda.is_available() and torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
