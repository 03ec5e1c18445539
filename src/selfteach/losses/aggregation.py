"""Count the tokens or rollouts of a mean, and divide token weights by the count."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

Aggregation = Literal["token_mean", "sequence_mean"]
Masks = Sequence[Sequence[float]]
"""One number per token of each sample: 1 where it is in the loss, else 0."""


def num_counted(masks: Masks, aggregation: Aggregation) -> float:
    """Return the denominator of a mean over tokens, or over rollouts that have a token in the loss."""
    counted = (sum(mask) if aggregation == "token_mean" else any(mask) for mask in masks)
    return float(sum(counted))


def normalize(masks: Masks, count: float, aggregation: Aggregation) -> list[list[float]]:
    """Return weights with which the sum over tokens is the mean; all 0 for a count of 0."""
    weights = []
    for mask in masks:
        denominator = count * (sum(mask) if aggregation == "sequence_mean" else 1)
        weights.append([value / denominator if denominator else 0.0 for value in mask])
    return weights
