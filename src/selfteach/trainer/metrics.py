"""Compute the metrics of one step from its rollouts and from the statistics of its loss."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict

import torch
from torch import Tensor

from selfteach.runtime.distributed import Ranks
from selfteach.trainer import rollout_statistics
from selfteach.trainer.reward_metrics import summarize_rewards
from selfteach.types import CritiqueFailure, Rollout, TokenWeights, TrainingSample, Usage

Metrics = dict[str, float]
TOKEN_VALUES = frozenset(
    {"loss", "logp", "total", "mismatch", "clipped", "teacher_logratio", "importance_capped",
     "distillation_share", "kl"}
)  # fmt: skip
"""Values of tokens that have a metric of their own; those of an objective of one's own are logged by
their name."""


def loss_coverage(samples: Sequence[TrainingSample], weights: Sequence[TokenWeights]) -> Metrics:
    """Compute the shares of rollouts, and of their end tokens, that are in the loss."""
    eos = rollout_statistics.eos_in_loss(samples, weights)
    return {
        "frac_in_loss": rollout_statistics.frac_in_loss(weights),
        **({} if eos is None else {"eos_in_loss": eos}),
    }


def summarize_samples(samples: Sequence[TrainingSample]) -> Metrics:
    """Compute rates and means over the step's rollouts, and the critic's usage and failures."""
    rollouts = [sample.rollout for sample in samples]
    tokens = sum(rollout.length for rollout in rollouts)
    count = max(1, len(rollouts))
    dropped = Counter(sample.dropped for sample in samples if sample.dropped)
    critiques = [sample.critiqued.critique for sample in samples if sample.critiqued.critique]
    failures = Counter(c.reason for c in critiques if isinstance(c, CritiqueFailure))
    fidelity = [sample.change.fidelity for sample in samples if sample.change]
    timeouts = sum(sample.critiqued.verdict.timed_out for sample in samples)
    usage = sum((critique.usage for critique in critiques), Usage())
    repetition = sum(rollout_statistics.repetition_in_turns(rollout) for rollout in rollouts)
    hesitations = sum(rollout_statistics.hesitations(rollout.model_text) for rollout in rollouts)
    return {
        "correct": sum(sample.critiqued.verdict.correct for sample in samples) / count,
        "formatted": sum(sample.critiqued.verdict.formatted for sample in samples) / count,
        **summarize_rewards(samples),
        **({"verifier_timeouts": timeouts} if timeouts else {}),
        "truncated": sum(not rollout.finished for rollout in rollouts) / count,
        "length": tokens / count,
        # The mean of -log p over sampled tokens is an unbiased estimate of the entropy per token.
        # An environment's tokens have a logp of 0, and none of them is among the tokens.
        "entropy": -sum(sum(rollout.logps) for rollout in rollouts) / max(1, tokens),
        "repetition": repetition / count,
        "hesitations": hesitations / count,
        "rollouts_sampled": len(rollouts),
        "tokens_sampled": tokens,
        **summarize_episodes(rollouts),
        "critiques": (critiqued := len(critiques) - sum(failures.values())),
        **({"critiqued": critiqued / count} if critiques else {}),
        **({"fidelity": sum(fidelity) / len(fidelity)} if fidelity else {}),
        **{f"critic_{name}": value for name, value in asdict(usage).items()},
        **{f"critique_failure/{reason}": n / count for reason, n in sorted(failures.items())},
        "dropped": sum(dropped.values()) / count,
        **{f"dropped/{reason}": number / count for reason, number in sorted(dropped.items())},
    }


def summarize_episodes(rollouts: Sequence[Rollout]) -> Metrics:
    """Compute means over the episodes of a step, by kind of event; empty without an environment."""
    episodes = [rollout for rollout in rollouts if rollout.is_episode]
    if not episodes:
        return {}
    events = Counter(s.event for rollout in episodes for s in rollout.segments if s.event)
    read = sum(len(rollout.token_ids) - rollout.length for rollout in episodes)
    return {
        "turns": sum(len(rollout.turns) for rollout in episodes) / len(episodes),
        "environment_tokens": read / len(episodes),
        **{f"event/{kind}": n / len(episodes) for kind, n in sorted(events.items())},
    }


def summarize_tokens(stats: Sequence[dict[str, Tensor]], ranks: Ranks) -> Metrics:
    """Compute means over the tokens of all micro-batches and ranks; each value of ``stats`` is [N]."""
    if not stats:
        return {"loss": 0.0}
    joined = {name: torch.cat([part[name] for part in stats]) for name in stats[0]}
    metrics = {"loss": ranks.sum(joined["total"].sum().item())}
    if "mismatch" in joined:
        mismatch_N = joined["mismatch"].abs()
        metrics |= {
            "mismatch_mean": ranks.mean(mismatch_N),
            "mismatch_max": ranks.max(mismatch_N),
            # KL(engine ‖ trainer), estimated by k3 on the sampled tokens.
            "mismatch_kl": ranks.mean(joined["mismatch"].expm1() - joined["mismatch"]),
        }
    if "clipped" in joined:
        metrics["clip_fraction"] = ranks.mean(joined["clipped"])
    if "teacher_logratio" in joined:
        metrics["teacher_logratio_abs"] = ranks.mean(joined["teacher_logratio"].abs())
    if "importance_capped" in joined:
        metrics["importance_ratio_capped"] = ranks.mean(joined["importance_capped"])
    if "distillation_share" in joined:
        metrics["distillation_share"] = ranks.mean(joined["distillation_share"])
    if "kl" in joined:
        metrics["kl_initial"] = ranks.mean(joined["kl"])
    others = {f"objective/{name}": joined[name] for name in sorted(joined.keys() - TOKEN_VALUES)}
    return {**metrics, **{name: ranks.mean(value_N.float()) for name, value_N in others.items()}}
