"""Measure `make lab` by phase against an earlier commit, and how the cost of a step grows.

    python benchmarks/training/main_job.py [--before COMMIT] [--parts phases growth whole] [--json FILE]

Three tables: seconds per step of each arm in this tree and at an earlier commit (their runs alternate,
one process and one thread each); the whole study of paper_in_miniature, as `make lab` runs
it; and the phases of a step as rollouts, their length and the vocabulary grow.
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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # harness

import numpy as np
import torch
from harness import Table, parser, ratio, reported
from transformers import AutoModelForCausalLM, AutoTokenizer

from selfteach.config.migrations import migrate_metrics
from selfteach.config.recipe import Recipe
from selfteach.config.schema import merge, validate
from selfteach.models.model_path import BASES
from selfteach.runtime.run_folder import RunFolder
from selfteach.trainer.async_training import RolloutRequest, train_steps
from selfteach.trainer.build import build

ROOT = Path(__file__).resolve().parents[2]
LAB = ROOT / "src" / "selfteach" / "recipes" / "paper_in_miniature.toml"
LAB_BEFORE = Path("experiments", "paper_in_miniature", "recipe.toml")
"""Where the same recipe was in earlier commits, with their keys."""
ARMS = ("grpo", "reference", "step_aligned")
PHASES = ("rollout", "critique", "train")
BASELINE = "225e670"
"""The commit before any optimization."""
SCALED: dict[str, tuple[int, ...]] = {
    "answers": (16, 32, 64, 128, 256),
    "tokens an answer": (16, 32, 64, 128),
    "vocabulary": (37, 1_024, 8_192, 32_768),
}
DEFAULT_SIZE = {"answers": 32, "tokens an answer": 32, "vocabulary": 37}
PARTS = ("phases", "growth", "whole")


def main() -> None:
    """Measure the chosen tables."""
    options = parser(__doc__)
    options.add_argument("--before", default=BASELINE, help="an earlier commit to compare with")
    options.add_argument("--parts", nargs="*", choices=PARTS, default=PARTS, help="which tables")
    options.add_argument("--keep", type=Path, help="a new folder in which the whole study is kept")
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
    """Measure each arm in this tree and at an earlier commit, alternating."""
    with tree_of(before) as earlier:
        trees = {"now": ROOT, **({before: earlier} if earlier else {})}
        for arm in ARMS:
            rows: dict[str, list[dict[str, float]]] = {name: [] for name in trees}
            for _ in range(rounds):
                for name, tree in trees.items():
                    rows[name].append(one_run(tree, arm, steps))
            for name in reversed(trees):
                medians = {
                    k: statistics.median(row[k] for row in rows[name]) for k in rows[name][0]
                }
                run_before = (
                    statistics.median(row["run"] for row in rows[before]) if earlier else None
                )
                table.add(
                    arm=arm, tree=name, **{phase: medians[phase] for phase in PHASES},
                    evaluating_per_answer=medians["evaluating"], beginning=medians["beginning"],
                    whole_run=medians["run"], times_faster=ratio(run_before, medians["run"]),
                )  # fmt: skip
    table.notes = (
        f"`whole_run`: seconds of {steps} steps with the validation curve's two points, from the "
        "command to its end; `beginning` is the time outside all phases: imports, loading, writing."
    )


def one_run(tree: Path, arm: str, steps: int) -> dict[str, float]:
    """Return the seconds of a short run: per step by phase, per evaluated rollout, rest and total."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        settings = {
            "train.steps": steps, "evaluation.every": steps, "evaluation.test": "false",
            "train.checkpoint_every": steps, "train.threads": 1,
        }  # fmt: skip
        recipe = LAB if tree == ROOT else tree / LAB_BEFORE
        command = [sys.executable, "-m", "selfteach", "train", str(recipe), "--arm", arm]
        command += ["--seed", "50", "--out", str(out)]
        command += [part for k, v in settings.items() for part in ("--set", f"{k}={v}")]
        environ = {**os.environ, "PYTHONPATH": str(tree / "src"), "OMP_NUM_THREADS": "1"}
        start = time.monotonic()
        subprocess.run(command, env=environ, check=True, capture_output=True, cwd=folder)
        seconds = time.monotonic() - start
        rows = read_metrics(out / "metrics.jsonl")
    return {**by_step(rows, steps), "beginning": seconds - in_phases(rows), "run": seconds}


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read a run's metrics, an earlier commit's under their present names."""
    return [migrate_metrics(json.loads(line)) for line in path.read_text().splitlines()]


def by_step(rows: list[dict[str, Any]], steps: int) -> dict[str, float]:
    """Return the mean seconds per step of each phase, and per evaluation rollout."""
    trained = [row for row in rows if row["kind"] == "step"]
    evaluated = [row for row in rows if "time/evaluate" in row]
    rollouts = sum(row["evaluation_rollouts"] for row in evaluated)
    return {
        **{phase: sum(row[f"time/{phase}"] for row in trained) / steps for phase in PHASES},
        "evaluating": sum(row["time/evaluate"] for row in evaluated) / max(1, rollouts),
    }


def in_phases(rows: list[dict[str, Any]]) -> float:
    """Return the seconds of all phases."""
    return sum(v for row in rows for k, v in row.items() if k.startswith("time/"))


@contextlib.contextmanager
def tree_of(commit: str) -> Iterator[Path | None]:
    """Yield the tree of an earlier commit, or None if it is not in the history."""
    with tempfile.TemporaryDirectory() as folder:
        archive = subprocess.run(
            ["git", "-C", str(ROOT), "archive", commit, "src", str(LAB_BEFORE)],
            capture_output=True,
            check=False,
        )
        if archive.returncode:
            print(f"no {commit} in this history: no comparison")
            yield None
            return
        subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)
        yield Path(folder)


def whole_study(table: Table, keep: Path | None) -> None:
    """Measure `make lab` from the command to the report, in ``keep`` or a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        out = (keep or Path(folder) / "study").absolute()
        command = [sys.executable, "-m", "selfteach", "study", str(LAB), "--out", str(out)]
        environ = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
        start = time.monotonic()
        subprocess.run(command, env=environ, check=True, cwd=folder, stdout=subprocess.DEVNULL)
        seconds = time.monotonic() - start
        logs = sorted(out.rglob("metrics.jsonl"))
        seconds_of: dict[str, float] = {}
        for log in logs:
            for row in read_metrics(log):
                for name, value in row.items():
                    if name.startswith("time/"):
                        phase = name.removeprefix("time/")
                        seconds_of[phase] = seconds_of.get(phase, 0.0) + value
    table.add(runs=len(logs), minutes=seconds / 60, core_minutes=2 * seconds / 60, **seconds_of)
    table.notes = (
        "Phases: seconds summed over all runs, two of which run at a time on one thread each. The "
        "rest of the core-minutes is starting and ending processes, the inspection and the report."
    )


def scaling(table: Table, *, steps: int, quick: bool) -> None:
    """Grow one size at a time; the exponent is the slope of log seconds on log size."""
    for grows, sizes in SCALED.items():
        chosen = sizes[:2] if quick else sizes
        measured = [one_size({**DEFAULT_SIZE, grows: size}, steps) for size in chosen]
        for size, seconds in zip(chosen, measured, strict=True):
            table.add(grows=grows, size=size, **seconds)
        slopes = {
            phase: f"exponent {exponent(chosen, [s[phase] for s in measured]):.2f}"
            for phase in measured[0]
        }
        table.add(grows=grows, size="", **slopes)
    table.notes = (
        "Rollouts are forced to the given length; training is distillation with the reference as "
        "context. The exponent is that between the two largest sizes: 1 is linear; below 1 a fixed "
        "cost still matters."
    )


def exponent(sizes: tuple[int, ...], seconds: list[float]) -> float:
    """Return d log(seconds) / d log(size) between the two largest sizes."""
    return float(np.log(seconds[-1] / seconds[-2]) / np.log(sizes[-1] / sizes[-2]))


def one_size(size: dict[str, int], steps: int) -> dict[str, float]:
    """Return the median seconds of the phases of a step."""
    with tempfile.TemporaryDirectory() as folder:
        model = "lab:two_styles"
        if size["vocabulary"] > DEFAULT_SIZE["vocabulary"]:
            model = wider(Path(folder), size["vocabulary"])
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
        batched: Any = built.components.engine
        engine = batched.engine
        engine._end_ids = ()  # rollouts only end at the length limit
        problems, count = built.task.problems("train"), size["answers"] // 8

        def request(step: int) -> RolloutRequest:
            start = (step * count) % (len(problems) - count)
            return RolloutRequest(
                step, problems[start : start + count], built.components.policy.version
            )

        rows = [
            metrics
            for _, (_, metrics) in train_steps(
                built.components, request, range(1, steps + 1), RunFolder(Path(folder) / "run")
            )
        ]
    return {
        p: statistics.median(row[f"time/{p}"] for row in rows[1:])
        for p in PHASES
        if p != "critique"
    }


def wider(folder: Path, vocabulary: int) -> str:
    """Save the lab's base with unused tokens added; return its folder."""
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
