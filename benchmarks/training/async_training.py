"""Measure asynchronous training with a critic of known latency, against sequential training.

    python benchmarks/training/async_training.py [--latency 2.0] [--steps 8]

The lab's policy trains; its critic is an HTTP server on the loopback that returns the oracle's
critiques and takes ``--latency`` seconds per request, however many are in flight. Sequential and
asynchronous runs alternate in one process. Prints seconds per step (without the first ``staleness +
1``), the active seconds of each phase, and the step's time as a share of the sequential run's longest
phase and of the sum of its phases. Rollouts differ between settings, and so does the number of critic requests.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "fakes"))

from scripted_critic import oracle_critique
from scripted_server import Server, says, serving

from selfteach.config.recipe import Recipe
from selfteach.config.schema import validate
from selfteach.runtime.run_folder import RunFolder
from selfteach.trainer.loop import run_to_end

SETTINGS = ((0, False), (1, False), (2, False), (2, True))
"""Staleness, and whether the engine has a separate copy of the weights."""


def recipe(server: Server, folder: Path, args: argparse.Namespace, setting: tuple) -> Recipe:
    """Return a recipe whose critic is the server; each step is one batch, critiqued in one latency."""
    staleness, separate_copy = setting
    rollouts = args.problems * args.group_size
    values = {
        "model": {"path": "lab:two_styles"},
        "data": {"type": "lab", "train": 256, "validation": 2, "test": 2},
        "sampling": {"max_tokens": 64, "batch_size": rollouts, "separate_copy": separate_copy},
        "critic": {
            "type": "endpoint", "base_url": server.url, "model": "oracle", "max_tokens": 64,
            "reply_cache": str(folder / "replies.sqlite"), "min_similarity": 0.0,
            "concurrency": rollouts,
        },
        "context": {"type": "step_aligned"},
        "objective": {"type": "distillation", "importance_cap": 2.0},
        "train": {
            "steps": args.steps, "problems_per_step": args.problems, "staleness": staleness,
            "group_size": args.group_size, "checkpoint_every": args.steps, "threads": 1,
        },
        "evaluation": {"every": args.steps, "validation_k": 1, "test": False},
    }  # fmt: skip
    return validate(Recipe, values, where="benchmark")


def measure(args: argparse.Namespace, setting: tuple) -> tuple[dict[str, float], int]:
    """Return mean seconds per step by name, and the number of critic requests."""
    warm_up = setting[0] + 1

    def slow(handler: Any, body: dict[str, Any]) -> None:
        time.sleep(args.latency)
        says(oracle_critique)(handler, body)

    with tempfile.TemporaryDirectory() as path, serving(slow) as server:
        folder = Path(path)
        run_to_end(recipe(server, folder, args, setting), folder / "run")
        rows = [row for row in RunFolder(folder / "run").metrics() if row["kind"] == "step"]
        rows = rows[warm_up:]
        names = [n for n in rows[0] if n.startswith(("time/", "active_")) or n == "waiting"]
        return {n: sum(row[n] for row in rows) / len(rows) for n in names}, len(server.asked)


def main() -> None:
    """Run every setting and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--latency", type=float, default=2.0)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--problems", type=int, default=16)
    parser.add_argument("--group-size", type=int, default=4)
    args = parser.parse_args()
    names = ("step, s", "rollout", "critique", "train", "waiting", "/longest", "/sum")
    print("staleness copy" + "".join(f"{name:>9s}" for name in names) + "  requests")
    longest = total = 0.0
    for setting in SETTINGS:
        mean, requests = measure(args, setting)
        step = sum(v for n, v in mean.items() if n.startswith("time/"))
        rollout, critique, train = (mean[f"active_{n}"] for n in ("rollout", "critique", "train"))
        if setting[0] == 0:  # the engine and the trainer share a module: they are one phase
            longest, total = max(critique, rollout + train), rollout + critique + train
        seconds = (step, rollout, critique, train, mean["waiting"])
        separate = "yes" if setting[1] else "no"
        line = "".join(f"{value:9.2f}" for value in (*seconds, step / longest, step / total))
        print(f"{setting[0]:9d} {separate:>4s}{line}{requests:10d}", flush=True)


if __name__ == "__main__":
    main()
