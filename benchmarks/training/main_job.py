"""`make lab` by phase, before and after, and how the cost of a step grows.

    python benchmarks/main_job.py [--before COMMIT] [--components phases growth whole] [--json FILE]

Three tables: seconds per step of each arm in the tree as it is and at an earlier commit (runs of both
alternate, one process and one thread each); the whole study of recipes/paper_in_miniature.toml, as
`make lab` runs it; and the phases of a step as answers, their length and the vocabulary grow.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import Table, parser, ratio, reported
from transformers import AutoModelForCausalLM, AutoTokenizer

from selfteach.config.recipe import Recipe
from selfteach.config.schema import merge, validate
from selfteach.models.loading import BASES
from selfteach.trainer.async_training import train_steps
from selfteach.trainer.build import build
from selfteach.trainer.step import RolloutRequest

ROOT = Path(__file__).resolve().parents[1]
LAB = ROOT / "recipes" / "paper_in_miniature.toml"
ARMS = ("grpo", "reference", "step_aligned")
PHASES = ("rollout", "critique", "train")
STARTED = "225e670"
"""The commit before anything was made faster."""
SCALED: dict[str, tuple[int, ...]] = {
    "answers": (16, 32, 64, 128, 256),
    "tokens an answer": (16, 32, 64, 128),
    "vocabulary": (37, 1_024, 8_192, 32_768),
}
USUAL = {"answers": 32, "tokens an answer": 32, "vocabulary": 37}


PARTS = ("phases", "growth", "whole")


def main() -> None:
    """Measure all three, or those that are named."""
    options = parser(__doc__)
    options.add_argument("--before", default=STARTED, help="an earlier commit to compare with")
    options.add_argument(
        "--components", nargs="*", choices=PARTS, default=PARTS, help="which tables"
    )
    options.add_argument("--keep", type=Path, help="a new folder for the whole study, which stays")
    args = options.parse_args()
    torch.set_num_threads(1)
    rounds, steps = (1, 3) if args.quick else (2, 20)
    with reported(args) as tables:
        if "phases" in args.parts:
            tables.append(table := Table("Seconds per step of the main setting, one thread"))
            by_phase(table, args.before, rounds=rounds, steps=steps)
        if "growth" in args.parts:
            title = "How the phases of a step grow (seconds per step, lab model)"
            tables.append(table := Table(title))
            scaling(table, steps=2 if args.quick else 6, quick=args.quick)
        if "whole" in args.parts and not args.quick:
            tables.append(table := Table("The whole study of `make lab`, two processes"))
            whole_study(table, args.keep)


def by_phase(table: Table, before: str, *, rounds: int, steps: int) -> None:
    """The arms, now and at an earlier commit, in turn."""
    with tree_of(before) as earlier:
        trees = {"now": ROOT, **({before: earlier} if earlier else {})}
        for arm in ARMS:
            rows: dict[str, list[dict[str, float]]] = {name: [] for name in trees}
            for _ in range(rounds):
                for name, tree in trees.items():
                    rows[name].append(one_run(tree, arm, steps))
            for name in reversed(trees):
                middle = {k: statistics.median(row[k] for row in rows[name]) for k in rows[name][0]}
                then = statistics.median(row["run"] for row in rows[before]) if earlier else None
                table.add(
                    arm=arm, tree=name, **{phase: middle[phase] for phase in PHASES},
                    evaluating_per_answer=middle["evaluating"], beginning=middle["beginning"],
                    whole_run=middle["run"], times_faster=ratio(then, middle["run"]),
                )  # fmt: skip
    table.notes = (
        f"`whole_run`: seconds of {steps} steps with the validation curve's two points, from the "
        "command to its end; `beginning` is what is not a phase: imports, loading, writing."
    )


def one_run(tree: Path, arm: str, steps: int) -> dict[str, float]:
    """Seconds of a short run: per step by phase, per evaluated answer, the rest, and the whole."""
    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / "run"
        settings = {
            "train.steps": steps, "evaluation.every": steps, "evaluation.test": "false",
            "train.checkpoint_every": steps, "train.threads": 1,
        }  # fmt: skip
        command = [sys.executable, "-m", "selfteach", "train", str(LAB), "--arm", arm]
        command += ["--seed", "50", "--out", str(out)]
        command += [part for k, v in settings.items() for part in ("--set", f"{k}={v}")]
        environ = {**os.environ, "PYTHONPATH": str(tree / "src"), "OMP_NUM_THREADS": "1"}
        began = time.monotonic()
        subprocess.run(command, env=environ, check=True, capture_output=True, cwd=place)
        seconds = time.monotonic() - began
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {**told(rows, steps), "beginning": seconds - busy(rows), "run": seconds}


def told(rows: list[dict[str, Any]], steps: int) -> dict[str, float]:
    """Mean seconds per step of each phase, and per evaluated answer."""
    taken = [row for row in rows if row["kind"] == "step"]
    measured = [row for row in rows if "time/evaluate" in row]
    answers = sum(row["evaluation_rollouts"] for row in measured)
    return {
        **{phase: sum(row[f"time/{phase}"] for row in taken) / steps for phase in PHASES},
        "evaluating": sum(row["time/evaluate"] for row in measured) / max(1, answers),
    }


def busy(rows: list[dict[str, Any]]) -> float:
    """Seconds that some phase has."""
    return sum(v for row in rows for k, v in row.items() if k.startswith("time/"))


@contextlib.contextmanager
def tree_of(commit: str) -> Iterator[Path | None]:
    """The source tree of an earlier commit, or None where the history does not hold it."""
    with tempfile.TemporaryDirectory() as place:
        archive = subprocess.run(
            ["git", "-C", str(ROOT), "archive", commit, "src"], capture_output=True, check=False
        )
        if archive.returncode:
            print(f"no {commit} in this history: nothing to compare with")
            yield None
            return
        subprocess.run(["tar", "-x", "-C", place], input=archive.stdout, check=True)
        yield Path(place)


def whole_study(table: Table, keep: Path | None) -> None:
    """`make lab` from the command to the report, in a folder that is thrown away unless it is named."""
    with tempfile.TemporaryDirectory() as place:
        out = (keep or Path(place) / "study").absolute()
        command = [sys.executable, "-m", "selfteach", "study", str(LAB), "--out", str(out)]
        environ = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
        began = time.monotonic()
        subprocess.run(command, env=environ, check=True, cwd=place, stdout=subprocess.DEVNULL)
        seconds = time.monotonic() - began
        logs = sorted(out.rglob("metrics.jsonl"))
        spent: dict[str, float] = {}
        for log in logs:
            for row in map(json.loads, log.read_text().splitlines()):
                for name, value in row.items():
                    if name.startswith("time/"):
                        phase = name.removeprefix("time/")
                        spent[phase] = spent.get(phase, 0.0) + value
    table.add(runs=len(logs), minutes=seconds / 60, core_minutes=2 * seconds / 60, **spent)
    table.notes = (
        "Phases: seconds summed over all runs, two of which go on side by side with one "
        "thread each. The rest of the core-minutes is beginning and ending processes, the "
        "inspection and the report."
    )


def scaling(table: Table, *, steps: int, quick: bool) -> None:
    """One thing grows at a time; the exponent is the slope of log seconds on log size."""
    for grows, sizes in SCALED.items():
        chosen = sizes[:2] if quick else sizes
        measured = [one_size({**USUAL, grows: size}, steps) for size in chosen]
        for size, seconds in zip(chosen, measured, strict=True):
            table.add(grows=grows, size=size, **seconds)
        slopes = {
            phase: f"exponent {exponent(chosen, [s[phase] for s in measured]):.2f}"
            for phase in measured[0]
        }
        table.add(grows=grows, size="", **slopes)
    table.notes = (
        "Answers are made to go on to the length named; learning is distillation from a reference "
        "in view. The exponent is that between the two largest sizes: 1 is linear; below it a fixed "
        "cost still counts."
    )


def exponent(sizes: tuple[int, ...], seconds: list[float]) -> float:
    """d log(seconds) / d log(size) between the two largest sizes."""
    return float(np.log(seconds[-1] / seconds[-2]) / np.log(sizes[-1] / sizes[-2]))


def one_size(size: dict[str, int], steps: int) -> dict[str, float]:
    """Median seconds of the phases of a step."""
    with tempfile.TemporaryDirectory() as place:
        model = "lab:two_styles"
        if size["vocabulary"] > USUAL["vocabulary"]:
            model = wider(Path(place), size["vocabulary"])
        values = {
            "model": {"path": model},
            "data": {"type": "lab", "train": 282, "validation": 1, "test": 1},
            "sampling": {"max_tokens": size["tokens an answer"]},
            "context": {"type": "reference"},
            "train": {
                "steps": steps, "problems_per_step": size["answers"] // 8,
                "group_size": 8,
            },
        }  # fmt: skip
        recipe = validate(Recipe, merge({}, values), where="benchmark")
        built = build(recipe)
        engine: Any = built.components.engine
        engine._end_ids = ()  # answers go on to the length that is wanted
        problems, asked = built.task.problems("train"), size["answers"] // 8

        def turn(step: int) -> RolloutRequest:
            start = (step * asked) % (len(problems) - asked)
            return RolloutRequest(
                step, problems[start : start + asked], built.components.policy.version
            )

        rows = [
            metrics for _, (_, metrics) in train_steps(built.components, turn, range(1, steps + 1))
        ]
    return {
        p: statistics.median(row[f"time/{p}"] for row in rows[1:])
        for p in PHASES
        if p != "critique"
    }


def wider(folder: Path, vocabulary: int) -> str:
    """The lab's base with tokens that it never uses."""
    base = BASES / "two_styles"
    model = AutoModelForCausalLM.from_pretrained(base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens([f"unused{i}" for i in range(vocabulary - len(tokenizer))])
    model.resize_token_embeddings(vocabulary, mean_resizing=False)
    target = folder / "wider"
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    (target / "world.json").write_text((base / "world.json").read_text())
    return str(target)


if __name__ == "__main__":
    main()
