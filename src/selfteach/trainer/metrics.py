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
    Lesson,
    NoCritique,
    Usage,
)

if TYPE_CHECKING:
    from selfteach.trainer.step import Parts

Metrics = dict[str, float]


def coverage(parts: Parts, lessons: Sequence[Lesson]) -> Metrics:
    """Which answers, and of these which end tokens, the loss of the step just taken has counted."""
    version = parts.policy.version - parts.updates_per_batch
    signals = parts.objective.weigh(lessons, parts.objective.count(lessons), version)
    ended = habits.end_supervised(lessons, signals)
    return {
        "taught": habits.taught(signals),
        **({} if ended is None else {"end_supervised": ended}),
    }


def describe(lessons: Sequence[Lesson]) -> Metrics:
    """What the step's answers were like: the health of a run."""
    rollouts = [lesson.rollout for lesson in lessons]
    tokens = sum(len(rollout.answer_ids) for rollout in rollouts)
    count = max(1, len(rollouts))
    dropped = Counter(lesson.dropped for lesson in lessons if lesson.dropped)
    critiques = [lesson.marked.critique for lesson in lessons if lesson.marked.critique]
    refused = Counter(c.reason for c in critiques if isinstance(c, NoCritique))
    fidelity = [lesson.change.fidelity for lesson in lessons if lesson.change]
    usage = sum((critique.usage for critique in critiques), Usage())
    return {
        "correct": sum(lesson.marked.verdict.correct for lesson in lessons) / count,
        "formatted": sum(lesson.marked.verdict.formatted for lesson in lessons) / count,
        "truncated": sum(not rollout.finished for rollout in rollouts) / count,
        "length": tokens / count,
        # The mean of -log p over sampled tokens is an unbiased estimate of the entropy per token.
        "entropy": -sum(sum(rollout.logps) for rollout in rollouts) / max(1, tokens),
        "repetition": sum(habits.repetition(rollout.answer_ids) for rollout in rollouts) / count,
        "hesitations": sum(habits.hesitations(rollout.text) for rollout in rollouts) / count,
        "answers_sampled": len(rollouts),
        "tokens_sampled": tokens,
        "critiques": len(critiques) - sum(refused.values()),
        **({"fidelity": sum(fidelity) / len(fidelity)} if fidelity else {}),
        **{f"critic_{name}": value for name, value in asdict(usage).items()},
        **{f"no_critique/{reason}": number / count for reason, number in sorted(refused.items())},
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
        "clipped": ranks.mean(joined["clipped"]),
    }
    if "advantage" in joined:
        metrics["advantage_abs"] = ranks.mean(joined["advantage"].abs())
    if "truncated" in joined:
        metrics["importance_truncated"] = ranks.mean(joined["truncated"])
    if "share" in joined:
        metrics["distilled_share"] = ranks.mean(joined["share"])
    if "kl" in joined:
        metrics["kl_initial"] = ranks.mean(joined["kl"])
    return metrics
