"""Checks that a recipe's model can be held and run as the rest of the recipe needs it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from selfteach.config.recipe import Recipe


def check_model(recipe: Recipe) -> None:
    """Refuse settings of the model that exclude others. Raises ValueError in one line."""
    model, sharded = recipe.model, recipe.distributed.shard != "none"
    if model.quantization is not None and sharded:
        raise ValueError(
            "model.quantization: weights in 4 bits are not sharded: set distributed.shard = "
            '"none", or remove quantization'
        )
    if not model.compile:
        return
    if sharded:
        raise ValueError(
            'model.compile: sharded layers are not compiled: set distributed.shard = "none", or remove '
            "compile"
        )
    if model.gradient_checkpointing is True:
        raise ValueError(
            "model.compile: layers whose activations are computed again are not compiled: remove "
            "model.gradient_checkpointing, or compile"
        )
    if recipe.train.deterministic:
        raise ValueError(
            "model.compile: compiled layers may sum in any order: remove train.deterministic, or "
            "compile"
        )
