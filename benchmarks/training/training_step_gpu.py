"""Measure a training step against TRL's SDPO and GRPO trainers on a GPU, at several sizes.

    python benchmarks/training/training_step_gpu.py [--models ...] [--json FILE]     (in .venv-bench)

`trainers_compared` describes the comparison. Models with random weights (`random_models`) get random
rollouts and contexts. Steps are timed as a whole, phases in one more step, where each
waits for the device; peaks are the allocator's. `--chunks 23 26` adds
our step with 2^23 and 2^26 logits per chunk.
"""

from __future__ import annotations

import argparse
import gc
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # harness
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

import torch
from harness import MIB, Table, parser, ratio, reported, resolve_device
from random_models import MODEL_SIZES
from step_clock import PHASES, Clock, steps_by_phase
from trainers_compared import (
    BF16,
    KINDS,
    OtherChunks,
    OtherMicroBatches,
    OurTrainer,
    TrlTrainer,
)

from selfteach.config.schema import merge

PRECISIONS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bf16": BF16,
    "bf16 weights": {"model": {"weights_dtype": "bfloat16"}},
}
"""Types of weights and matmuls on CUDA; TRL is configured alike."""


def main() -> None:
    """Measure the lab's model and shapes with random weights."""
    options = parser(__doc__)
    options.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="cpu: a smoke test"
    )
    models = ["lab", *MODEL_SIZES]
    options.add_argument("--models", nargs="*", choices=models, default=models[:2])
    options.add_argument("--kinds", nargs="*", choices=KINDS)
    options.add_argument("--precisions", nargs="*", choices=PRECISIONS)
    options.add_argument("--chunks", nargs="*", type=int, default=[], help="top-K and grpo")
    args = options.parse_args()
    args.device = resolve_device(args.device)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with reported(args) as tables:
        measure(args, tables)


def compare(
    table: Table, model: str, kind: str, precision: str, args: argparse.Namespace,
    changes: Mapping[str, Any] | None = None, micro_batches: Sequence[int] = (),
) -> None:  # fmt: skip
    """Add a row for each trainer, and for ours with other chunks and ``micro_batches`` (tokens).

    ``changes`` are of our recipe; where it has adapters, so has TRL. Without TRL its row says so.
    """
    values = merge({"model": {"device": args.device}}, PRECISIONS[precision])
    clocks = {"ours": Clock(), "TRL": Clock()}
    ours = OurTrainer(model, kind, clocks["ours"], merge(values, changes or {}))
    failed: dict[str, str] = {}
    sizes = args.chunks if kind in ("top-K", "grpo") else []  # the others may use fused kernels
    others = {f"ours, 2^{n} logits": OtherChunks(ours, Clock(), 2**n) for n in sizes}
    others |= {
        f"ours, {tokens:,} tokens": OtherMicroBatches(ours, Clock(), tokens)
        for tokens in micro_batches
    }
    clocks |= {who: other.clock for who, other in others.items()}
    steps = 1 + args.rounds + steps_by_phase()
    try:
        trl = TrlTrainer(model, kind, clocks["TRL"], ours, steps, args.device, precision)
        trl.others += others.values()
        trl.trainer.train()
    except (torch.cuda.OutOfMemoryError, ImportError) as error:
        failed["TRL"] = f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
        trl = None
        gc.collect()
        torch.cuda.empty_cache()
        without_trl(ours, list(others.values()), steps)
    medians = {who: clock.medians() for who, clock in clocks.items() if len(clock.steps) > 1}
    for who in clocks:
        row = medians.get(who, {}) if who not in failed else {}
        base = medians.get("ours", {})
        table.add(
            model=model, precision=precision, kind=kind, who=who, step=row.get("step"),
            **{phase: row.get(phase) for phase in PHASES},
            rest=row.get("rest"),
            **{"times ours": ratio(row.get("step"), base.get("step"))},
            **{"without sampling": ratio(
                row["step"] - row.get("sampling", 0.0), base["step"] - base.get("sampling", 0.0)
            ) if row and base else None},
            packed=str(ours.components.policy.packs_sequences).lower() if who != "TRL" else None,
            peak_MiB=clocks[who].peak / MIB if row else None,
            failed=failed.get(who),
        )  # fmt: skip


def without_trl(ours: OurTrainer, others: list[OtherChunks], steps: int) -> None:
    """Measure ours where TRL ran out of memory."""
    for trainer in (ours, *others):
        trainer.clock.steps.clear()
        for number in range(steps):
            trainer.clock.by_phase = number + steps_by_phase() == steps
            trainer.step()


def measure(args: argparse.Namespace, tables: list[Table]) -> None:
    """Measure the chosen models, precisions and kinds."""
    tables.append(table := Table("A training step on a GPU, seconds"))
    table.notes = (
        "`times ours` above 1: slower than ours. With random weights, both trainers get the same "
        "random rollouts and contexts, and sampling is skipped. bf16: float32 weights under autocast. "
        "`peak_MiB`: peak of a step beyond weights, moments and teachers. Phases and `rest`: of one "
        "more step, in which each waits for the device. `packed`: sequences run without padding."
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
