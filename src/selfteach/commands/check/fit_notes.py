"""Name settings that look wrong for a recipe's model and data, and memory that is not there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from selfteach.commands.check.sizes import RunSizes, device_load
from selfteach.config.model_defaults import ADAPTERS_LR, ALL_WEIGHTS_LR
from selfteach.config.objective_section import terms
from selfteach.config.recipe import Recipe
from selfteach.trainer.device_load import device_memory, require_fits
from selfteach.trainer.device_memory import gib, memory
from selfteach.trainer.fit_checks import REFERENCES, with_reference

FAR = 30
"""Factor from the usual learning rate at which one is named."""
WIDE_FOR_ROLLOUTS = 0.05
"""Clip range above which a geometric mean over a rollout's tokens is nearly never clipped."""
SMALL_MODEL = 30_000_000
"""Parameters below which a model is a toy, for which no rate is usual."""


def fit_notes(
    recipes: Mapping[str, Recipe], sizes: Mapping[str, RunSizes], *, here: bool
) -> Iterator[str]:
    """Yield a line for each setting that looks wrong for its model and data.

    ``here``: the recipe will run on this machine, so its memory counts. Raises `RecipeError` if
    weights and optimizer moments alone exceed the memory of the device.
    """
    lines = dict[str, None]()  # a note that arms share is printed once
    for arm, recipe in recipes.items():
        lines |= dict.fromkeys(_of_run(recipe, sizes[arm], here))
    yield from lines


def _of_run(recipe: Recipe, sizes: RunSizes, here: bool) -> Iterator[str]:
    yield from _rate(recipe, sizes)
    yield from _length(recipe, sizes)
    yield from _references(recipe, sizes)
    yield from _rollout_ratios(recipe)
    if here:
        yield from _memory(recipe, sizes)


def _rate(recipe: Recipe, sizes: RunSizes) -> Iterator[str]:
    lr, lora = recipe.optimizer.lr, recipe.model.lora
    usual = ADAPTERS_LR if lora else ALL_WEIGHTS_LR
    if recipe.train.steps == 0 or sizes.parameters < SMALL_MODEL:
        return
    if not usual / FAR <= lr <= usual * FAR:
        what = "adapters" if lora else "all weights of a language model"
        yield (
            f"note: optimizer.lr = {lr:g} is far from what {what} usually take (about {usual:g}): "
            "sweep it before a long run"
        )


def _length(recipe: Recipe, sizes: RunSizes) -> Iterator[str]:
    needed, limit = sizes.lengths.mean_reference, recipe.sampling.max_tokens
    if needed is not None and limit < needed:
        yield (
            f"note: sampling.max_tokens = {limit:,} is less than the references have on average "
            f"({needed:,.0f} tokens): rollouts of that length are cut, and cut rollouts are wrong"
        )


def _references(recipe: Recipe, sizes: RunSizes) -> Iterator[str]:
    name, task = REFERENCES.get(recipe.context.type), sizes.task
    if name is None or task is None or recipe.train.steps == 0 or recipe.context.fallback:
        return
    without = len(task.train) - with_reference(task, name)
    if without:
        yield (
            f"note: {without:,} of {len(task.train):,} training problems have no {name}: their "
            f'rollouts are dropped under context "{recipe.context.type}"'
        )


def _rollout_ratios(recipe: Recipe) -> Iterator[str]:
    grpo = terms(recipe.objective)[1]
    if grpo is None or grpo.importance_level != "sequence":
        return
    if max(grpo.clip_low, grpo.clip_high) > WIDE_FOR_ROLLOUTS:
        yield (
            f"note: a clip range of {grpo.clip_low:g} and {grpo.clip_high:g} hardly ever clips a mean "
            "over whole rollouts (objective.importance_level): GSPO takes clip_low = 3e-4 and "
            "clip_high = 4e-4"
        )
    if grpo.aggregation != "sequence_mean":
        yield (
            f'note: objective.aggregation = "{grpo.aggregation}" weights the ratio of a whole rollout '
            'by its length: GSPO takes "sequence_mean" (loss_type = "grpo")'
        )


def _memory(recipe: Recipe, sizes: RunSizes) -> Iterator[str]:
    available = device_memory(recipe.model.device)
    load = device_load(recipe, sizes, available)
    if load is None or recipe.distributed.shard != "none":
        return
    require_fits(load, available, recipe.model)
    peak = memory(load).peak
    if peak > available:
        yield (
            f"note: the peak of {gib(peak)} exceeds this device's {gib(available)}: lower "
            "train.micro_batch_tokens or sampling.batch_size, or set model.gradient_checkpointing"
        )
