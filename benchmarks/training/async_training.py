"""How long a step takes when a critic of known latency is waited for, and when it is not.

    python benchmarks/overlap.py [--latency 2.0] [--steps 8]

The lab's solver learns; its critic is a real HTTP server on the loopback that knows the right marks
and takes ``--latency`` seconds over each request, however many there are. Sequential and overlapped
runs alternate in one process. Prints seconds per step (the first ``staleness + 1`` left out), what each
phase was busy, and the step's time as a share of the sequential run's longest phase and of the sum of
its phases. Answers differ between settings, and so does how often the critic is asked.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "fakes"))

from scripted_critic import criticises
from scripted_server import Server, says, serving

from selfteach.config.recipe import Recipe
from selfteach.config.schema import validate
from selfteach.runtime.run_folder import RunFolder
from selfteach.trainer.loop import run_to_end

SETTINGS = ((0, False), (1, False), (2, False), (2, True))
"""Staleness, and whether the engine has weights of its own."""


def recipe(server: Server, folder: Path, args: argparse.Namespace, setting: tuple) -> Recipe:
    """A run whose critic is the server; each step is one batch, so its marking is one latency."""
    staleness, separate_copy = setting
    answers = args.problems * args.answers
    values = {
        "model": {"path": "lab:two_styles"},
        "data": {"type": "lab", "train": 256, "validation": 2, "test": 2},
        "sampling": {"max_tokens": 64, "batch_size": answers, "separate_copy": separate_copy},
        "critic": {
            "type": "endpoint", "base_url": server.url, "model": "oracle", "max_tokens": 64,
            "reply_cache": str(folder / "replies.sqlite"), "min_similarity": 0.0, "concurrency": answers,
        },
        "context": {"type": "step_aligned"},
        "objective": {"type": "distillation", "importance_cap": 2.0},
        "train": {
            "steps": args.steps, "problems_per_step": args.problems, "staleness": staleness,
            "group_size": args.answers, "checkpoint_every": args.steps, "threads": 1,
        },
        "evaluation": {"every": args.steps, "validation_k": 1, "test": False},
    }  # fmt: skip
    return validate(Recipe, values, where="benchmark")


def measure(args: argparse.Namespace, setting: tuple) -> tuple[dict[str, float], int]:
    """Mean seconds per step by name, and how often the critic was asked."""
    warm_up = setting[0] + 1

    def slow(handler: Any, body: dict[str, Any]) -> None:
        time.sleep(args.latency)
        says(criticises)(handler, body)

    with tempfile.TemporaryDirectory() as place, serving(slow) as server:
        folder = Path(place)
        run_to_end(recipe(server, folder, args, setting), folder / "run")
        rows = [row for row in RunFolder(folder / "run").metrics() if row["kind"] == "step"]
        rows = rows[warm_up:]
        names = [n for n in rows[0] if n.startswith(("time/", "active_")) or n == "waiting"]
        return {n: sum(row[n] for row in rows) / len(rows) for n in names}, len(server.asked)


def main() -> None:
    """Run every setting and print a line of each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--latency", type=float, default=2.0)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--problems", type=int, default=16)
    parser.add_argument("--answers", type=int, default=4)
    args = parser.parse_args()
    names = ("step, s", "sampling", "marking", "learning", "waiting", "/longest", "/sum")
    print("staleness  own" + "".join(f"{name:>9s}" for name in names) + "  requests")
    longest = whole = 0.0
    for setting in SETTINGS:
        mean, asked = measure(args, setting)
        step = sum(v for n, v in mean.items() if n.startswith("time/"))
        sampling, marking, learning = (
            mean[f"active_{n}"] for n in ("rollout", "critique", "train")
        )
        if setting[0] == 0:  # the engine and the trainer share a module: they are one phase
            longest, whole = max(marking, sampling + learning), sampling + marking + learning
        told = (step, sampling, marking, learning, mean["waiting"])
        own = "yes" if setting[1] else "no"
        line = "".join(f"{value:9.2f}" for value in (*told, step / longest, step / whole))
        print(f"{setting[0]:9d} {own:>4s}{line}{asked:10d}", flush=True)


if __name__ == "__main__":
    main()
