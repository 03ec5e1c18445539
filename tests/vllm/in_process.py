"""Runs vLLM in this process and prints how much its logprobs differ from the trainer's, as JSON.

It is run by the Python of vLLM's environment.

python in_process.py MODEL full|lora [SETTING...]
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from selfteach.config.recipe import Recipe
from selfteach.config.schema import merge, parse_setting, validate
from selfteach.losses.policy_gradient import token_logp
from selfteach.models.sequences import sequences
from selfteach.trainer.build import build
from selfteach.types import Rollout, Sampling

SAMPLING = Sampling(samples=2, temperature=0.7, max_tokens=8, seed=5)
LORA = {"model": {"lora": {"rank": 4, "alpha": 8, "targets": ["q_proj", "v_proj"]}}}


def recipe(model: str, kind: str, folder: Path, settings: list[str]) -> Recipe:
    """Return a recipe of three problems, one per split."""
    paths = {}
    for at, split in enumerate(("train", "validation", "test")):
        paths[split] = str(folder / f"{split}.jsonl")
        row = {"question": f"What is {at + 3} + {at + 4}?", "answer": str(2 * at + 7)}
        Path(paths[split]).write_text(json.dumps(row))
    values: dict[str, Any] = {
        "model": {"path": model},
        "data": {"type": "files", **paths},
        "sampling": {"max_tokens": 8, "temperature": 0.7},
        "train": {"steps": 0, "max_length": 1024},
        "engine": {"type": "vllm", "max_num_seqs": 8, "enforce_eager": True},
    }
    values = merge(values, LORA if kind == "lora" else {})
    for setting in settings:
        values = merge(values, parse_setting(setting))
    return validate(Recipe, values)


def mismatch(built: Any, rollouts: list[Rollout]) -> float:
    """Return the largest difference of log-probabilities, trainer against engine, in nats."""
    worst = 0.0
    for rollout in rollouts:
        side = sequences([rollout.prompt_ids], [rollout.token_ids], 0)
        with torch.no_grad():
            logits = built.components.policy.score(side.to(built.components.policy.device)).logits(
                slice(None)
            )
        trainer = token_logp(logits.cpu(), torch.tensor(rollout.token_ids), SAMPLING.temperature)
        worst = max(worst, (trainer - torch.tensor(rollout.logps)).abs().max().item())
    return worst


def main(model: str, kind: str, *settings: str) -> None:
    """Sample with three versions of the weights; measure differences and whether draws repeat."""
    report: dict[str, Any] = {
        "mismatch": [], "mismatch_before": [], "repeats": [], "seconds": [], "free": [],
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        built = build(recipe(model, kind, Path(folder), list(settings)))
    engine, policy, problems = built.components.engine, built.components.policy, built.task.train
    before: list[Rollout] = []
    for version in range(3):
        started = time.monotonic()
        engine.load_weights(policy.trainable.items(), version)
        report["seconds"].append(time.monotonic() - started)
        rollouts = engine.generate(problems, SAMPLING)
        again = engine.generate(problems, SAMPLING)
        if torch.cuda.is_available():
            report["free"].append(torch.cuda.mem_get_info()[0])
        report["mismatch"].append(mismatch(built, rollouts))
        report["mismatch_before"] += [mismatch(built, before)] if before else []
        report["repeats"].append([r.token_ids for r in again] == [r.token_ids for r in rollouts])
        before = rollouts
        with torch.no_grad():
            for weight in policy.trainable.values():
                weight.add_(torch.randn_like(weight) * (0.05 if kind == "lora" else 0.01))
    sys.stdout.write(json.dumps(report) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
