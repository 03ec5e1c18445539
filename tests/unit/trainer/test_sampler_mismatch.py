"""Trainer against engine: what is measured of it, and what truncated importance weights do; by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from selfteach.losses.divergence import Divergence
from selfteach.losses.objectives import Anneal, Distillation, Grpo, Hybrid
from selfteach.models.sequences import sequences
from selfteach.protocols import Objective
from selfteach.runtime.distributed import SINGLE_PROCESS
from selfteach.trainer.metrics import summarize_tokens
from selfteach.types import Batch

LN2 = math.log(2)
CAP = 1.5
LOGITS = torch.zeros(3, 2)
"""Two tokens, as likely as each other: log-probabilities of −ln 2."""
ENGINE = torch.tensor([-2 * LN2, -LN2, -0.0])
"""The engine thought 1/4, 1/2, 1: ratios of 2, 1, 1/2, of which the cap cuts the first."""


def batch(share: Tensor | None = None, old: Tensor | None = None) -> Batch:
    side = sequences([(0,)], [(1, 1, 1)], 0)
    ones = torch.ones(3)
    return Batch(side, side, torch.tensor([1, 1, 1]), ones, ones, ENGINE, old, share)


def distillation(cap: float | None) -> Distillation:
    return Distillation(Divergence("forward_kl"), 1.0, importance_cap=cap)


def hybrid(distilled: float | None, rewarded: float | None) -> Hybrid:
    return Hybrid(distillation(distilled), Grpo(1.0, importance_cap=rewarded), Anneal(0.5, 0.5))


@pytest.mark.parametrize("objective", [distillation, lambda cap: Grpo(1.0, importance_cap=cap)])
def test_weights_are_capped_ratios_and_cut_ones_are_counted(objective) -> None:
    teacher = torch.tensor([[0.0, 1.0]]).expand(3, 2)
    plain, capped = (
        objective(cap).per_token(LOGITS, teacher, batch(), slice(None)) for cap in (None, CAP)
    )
    torch.testing.assert_close(capped["loss"], plain["loss"] * torch.tensor([1.5, 1.0, 0.5]))
    assert (
        capped["importance_capped"].tolist() == [1.0, 0.0, 0.0] and "importance_capped" not in plain
    )


def test_with_several_updates_grpo_is_weighed_by_where_it_began() -> None:
    # The ratio of policies is the surrogate's own; the engine's is that of the first update.
    old = torch.full((3,), -2 * LN2)
    stats = Grpo(1.0, importance_cap=CAP).per_token(LOGITS, None, batch(old=old), slice(None))
    assert stats["importance_capped"].tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("objective", "wanted"),
    [
        (hybrid(CAP, CAP), [1.0, 0.0, 0.0]),
        (hybrid(CAP, None), [0.25, 0.0, 0.0]),
        (hybrid(None, CAP), [0.75, 0.0, 0.0]),
    ],
)
def test_a_mixture_counts_in_the_proportion_of_its_shares(
    objective: Objective, wanted: list[float]
) -> None:
    mixed = batch(share=torch.full((3,), 0.25))
    teacher = torch.zeros(3, 2)
    stats = objective.per_token(LOGITS, teacher, mixed, slice(None))
    assert stats["importance_capped"].tolist() == wanted
    # Micro-batches with and without a teacher say the same things, or they could not be joined.
    assert objective.per_token(LOGITS, None, mixed, slice(None)).keys() == stats.keys()


def test_a_mixture_without_a_cap_says_nothing_of_one() -> None:
    mixed = batch(share=torch.full((3,), 0.25))
    assert "importance_capped" not in hybrid(None, None).per_token(LOGITS, None, mixed, slice(None))


def test_what_a_step_says_of_the_mismatch() -> None:
    stats = {
        "total": torch.zeros(1),
        "clipped": torch.zeros(2),
        "mismatch": torch.tensor([LN2, -LN2]),
        "importance_capped": torch.tensor([1.0, 0.0]),
    }
    metrics = summarize_tokens([stats], SINGLE_PROCESS)
    assert metrics["mismatch_mean"] == pytest.approx(LN2)
    assert metrics["mismatch_max"] == pytest.approx(LN2)
    # k3: (2 − 1 − ln 2) and (1/2 − 1 + ln 2), whose mean is 1/4.
    assert metrics["mismatch_kl"] == pytest.approx(0.25)
    assert metrics["importance_ratio_capped"] == 0.5
