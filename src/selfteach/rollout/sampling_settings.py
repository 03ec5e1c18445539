"""Reads the settings of an engine from a recipe: for training and for evaluations."""

from __future__ import annotations

from selfteach.config.recipe import Recipe
from selfteach.types import Sampling


def training_sampling(recipe: Recipe, samples: int, seed: int) -> Sampling:
    """Return the settings with which so many rollouts of a problem are sampled in training."""
    config = recipe.sampling
    return Sampling(
        samples, config.temperature, config.max_tokens, seed,
        top_p=config.top_p, top_k=config.top_k, min_p=config.min_p,
    )  # fmt: skip


def evaluation_sampling(recipe: Recipe, samples: int, seed: int) -> Sampling:
    """Return the settings with which so many rollouts of a problem are sampled in evaluations."""
    config = recipe.evaluation
    return Sampling(
        samples, config.temperature, config.max_tokens or recipe.sampling.max_tokens, seed,
        top_p=config.top_p, top_k=config.top_k, min_p=config.min_p,
    )  # fmt: skip
