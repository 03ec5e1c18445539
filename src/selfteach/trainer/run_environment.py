"""Records what a run's results depend on besides its recipe: versions, machine, choices made on it."""

from __future__ import annotations

from typing import Any

from selfteach.config.recipe import Recipe
from selfteach.models.loading import dtypes_of
from selfteach.runtime.distributed import Ranks
from selfteach.runtime.provenance import collect_provenance, cpu_capability
from selfteach.runtime.run_folder import RunFolder
from selfteach.trainer.device_load import with_choices, with_memory_choices


def environment_of(recipe: Recipe, ranks: Ranks) -> dict[str, Any]:
    """Return ``environment.json`` of a run that starts here."""
    dtypes = dtypes_of(
        recipe.model, recipe.model.device, all_weights_train=recipe.all_weights_train
    )
    shards = 1 if recipe.distributed.shard == "none" else ranks.size
    chosen = with_memory_choices(recipe, shards)
    return {
        **collect_provenance(),
        "processor": cpu_capability(),
        "weights_dtype": str(dtypes.weights).removeprefix("torch."),
        "matmul_dtype": str(dtypes.compute).removeprefix("torch."),
        "micro_batch_tokens": chosen.train.micro_batch_tokens,
        "gradient_checkpointing": chosen.model.gradient_checkpointing,
    }


def as_started(recipe: Recipe, run: RunFolder, ranks: Ranks) -> Recipe:
    """Return the recipe with the choices of the run's start, whatever memory is free now.

    So a resumed run splits its steps into the same micro-batches. On every rank.
    """
    tokens, recompute = ranks.broadcast(run.memory_choices() if ranks.is_main else (0, False))
    return with_choices(recipe, tokens, recompute)
