"""Tiny policies whose rollouts a scripted vLLM server samples: their recipe, and new weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from selfteach.losses.policy_gradient import token_logp
from selfteach.models.sequences import sequences
from selfteach.trainer.build import Built
from selfteach.types import Rollout, Sampling

TINY: dict[str, Any] = {
    "data": {"type": "lab", "train": 6, "validation": 1, "test": 1},
    "sampling": {"max_tokens": 6, "temperature": 0.7},
    "train": {"steps": 0, "max_length": 96},
}
LORA = {"model": {"lora": {"rank": 2, "alpha": 4, "targets": ["q_proj", "v_proj"]}}}
KINDS = pytest.mark.parametrize(
    "more", [{}, pytest.param(LORA, marks=pytest.mark.slow)], ids=["full", "lora"]
)
SAMPLING = Sampling(samples=2, temperature=0.7, max_tokens=6, seed=5)


def publish(built: Built, version: int) -> None:
    """Send the trainer's weights to its engine."""
    policy = built.components.policy
    built.components.engine.load_weights(policy.trainable.items(), version)


def mismatch(built: Built, rollouts: list[Rollout], temperature: float = 0.7) -> float:
    """Return the largest difference of sampled tokens' log-probabilities, trainer against engine."""
    worst = 0.0
    for rollout in rollouts:
        side = sequences([rollout.prompt_ids], [rollout.token_ids], 0)
        with torch.no_grad():
            logits = built.components.policy.score(side).logits(slice(None))
        trainer = token_logp(logits, torch.tensor(rollout.token_ids), temperature)
        sampled = list(rollout.model_positions)
        difference = (trainer - torch.tensor(rollout.logps))[sampled]
        worst = max(worst, difference.abs().max().item())
    return worst


def move(built: Built, by: float = 0.05, *, seed: int | None = None) -> None:
    """Change every weight of the trainer: differently each time, or with a seed by the same."""
    stream = None if seed is None else torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in built.components.policy.trainable.values():
            weight.add_(torch.randn(weight.shape, generator=stream) * by)
