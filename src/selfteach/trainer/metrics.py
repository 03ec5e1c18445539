"""Metrics of one step: what its rollouts were like, and what the loss did."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from selfteach.runtime.distributed import Ranks
from selfteach.trainer import habits
from selfteach.types import (
    CritiqueFailure,
    TrainingSample,
    Usage,
)

if TYPE_CHECKING:
    from selfteach.trainer.step import Components

Metrics = dict[str, float]


def coverage(components: Components, samples: Sequence[TrainingSample]) -> Metrics:
    """Which answers, and of these which end tokens, the loss of the step just taken has counted."""
    version = components.policy.version - components.num_iterations
    token_weights = components.objective.token_weights(
        samples, components.objective.denominators(samples), version
    )
    ended = habits.eos_in_loss(samples, token_weights)
    return {
        "taught": habits.taught(token_weights),
        **({} if ended is None else {"eos_in_loss": ended}),
    }


def describe(samples: Sequence[TrainingSample]) -> Metrics:
    """What the step's answers were like: the health of a run."""
    rollouts = [sample.rollout for sample in samples]
    tokens = sum(len(rollout.token_ids) for rollout in rollouts)
    count = max(1, len(rollouts))
    dropped = Counter(sample.dropped for sample in samples if sample.dropped)
    critiques = [sample.critiqued.critique for sample in samples if sample.critiqued.critique]
    refused = Counter(c.reason for c in critiques if isinstance(c, CritiqueFailure))
    fidelity = [sample.change.fidelity for sample in samples if sample.change]
    usage = sum((critique.usage for critique in critiques), Usage())
    return {
        "correct": sum(sample.critiqued.verdict.correct for sample in samples) / count,
        "formatted": sum(sample.critiqued.verdict.formatted for sample in samples) / count,
        "truncated": sum(not rollout.finished for rollout in rollouts) / count,
        "length": tokens / count,
        # The mean of -log p over sampled tokens is an unbiased estimate of the entropy per token.
        "entropy": -sum(sum(rollout.logps) for rollout in rollouts) / max(1, tokens),
        "repetition": sum(habits.repetition(rollout.token_ids) for rollout in rollouts) / count,
        "hesitations": sum(habits.hesitations(rollout.text) for rollout in rollouts) / count,
        "rollouts_sampled": len(rollouts),
        "tokens_sampled": tokens,
        "critiques": len(critiques) - sum(refused.values()),
        **({"fidelity": sum(fidelity) / len(fidelity)} if fidelity else {}),
        **{f"critic_{name}": value for name, value in asdict(usage).items()},
        **{
            f"critique_failure/{reason}": number / count
            for reason, number in sorted(refused.items())
        },
        "dropped": sum(dropped.values()) / count,
        **{f"dropped/{reason}": number / count for reason, number in sorted(dropped.items())},
    }


def summarize(said: Sequence[dict[str, Tensor]], ranks: Ranks) -> Metrics:
    """Means over the tokens that were scored, on whatever rank."""
    if not said:
        return {"loss": 0.0}
    joined = {name: torch.cat([part[name] for part in said]) for name in said[0]}
    mismatch_N = joined["mismatch"].abs()
    metrics = {
        "loss": ranks.sum(joined["total"].sum().item()),
        "mismatch_mean": ranks.mean(mismatch_N),
        "mismatch_max": ranks.max(mismatch_N),
        # KL(engine ‖ trainer), estimated by k3 on what the engine has sampled.
        "mismatch_kl": ranks.mean(joined["mismatch"].expm1() - joined["mismatch"]),
        "clip_fraction": ranks.mean(joined["clipped"]),
    }
    if "teacher_logratio" in joined:
        metrics["teacher_logratio_abs"] = ranks.mean(joined["teacher_logratio"].abs())
    if "importance_capped" in joined:
        metrics["importance_ratio_capped"] = ranks.mean(joined["importance_capped"])
    if "distillation_share" in joined:
        metrics["distillation_share"] = ranks.mean(joined["distillation_share"])
    if "kl" in joined:
        metrics["kl_initial"] = ranks.mean(joined["kl"])
    return metrics
