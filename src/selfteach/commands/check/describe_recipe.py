"""What a recipe would do and cost, before anything is spent."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from selfteach.commands.check.memory import Item, Memory, gib, memory
from selfteach.commands.check.sizes import Survey, load_of, look, survey
from selfteach.commands.check.tokens import Budget, step_cost, step_tokens
from selfteach.commands.study.run_study import inspection_of
from selfteach.config.objective_section import terms
from selfteach.config.recipe import Recipe
from selfteach.config.recipe_file import Study
from selfteach.models import matmul
from selfteach.tasks.task import describe_problems
from selfteach.trainer.build import build

UNREADABLE = (
    "note: the lab's bases do not read environment feedback: it teaches next to nothing there"
)
"""Measured: docs/concepts.md."""
SLOW_HALVES = (
    "note: this processor has no instructions for products of bfloat16, which take many times as long "
    'as in float32 here: use model.autocast = "auto" (or false) and weights_dtype = "float32"'
)
STALE = (
    "note: train.staleness is above 0 without objective.importance_cap: answers of older weights are "
    "learned from uncorrected; 2.0 is a usual cap"
)


def describe_study(study: Study, *, offline: bool = False) -> Iterator[str]:
    """Lines that tell the resolved recipe, sizes, memory and budget.

    Builds every arm, so that whatever can fail fails here; ``offline`` looks up what is here instead
    and says what is not (`survey.look`). Raises what `build.build` raises.
    """
    seeds = study.study.seeds
    resolved = {arm: study.recipe(arm, seed=seeds[0]) for arm in study.arms}
    first = next(iter(resolved))
    plain = {arm: recipe.model_dump(mode="json") for arm, recipe in resolved.items()}
    yield f"# {first}, resolved"
    yield json.dumps(plain[first], indent=2)
    for arm in list(resolved)[1:]:
        yield f"# {arm}: what differs from {first}"
        yield json.dumps(differences(plain[first], plain[arm]), indent=2)
    known = {arm: _know(recipe, offline) for arm, recipe in resolved.items()}
    yield from _unchecked(known)
    yield from notes(resolved.values(), here=not offline)
    yield "# sizes"
    yield from _sizes(known[first])
    if (task := known[first].task) is not None:
        yield from describe_problems(task)
    told: dict[Memory, str] = {}
    for arm, recipe in resolved.items():
        yield f"# {arm}, per seed"
        yield from _budget(recipe, known[arm])
        load = load_of(recipe, known[arm])
        if load is not None and recipe.train.steps:
            yield from _memory(arm, memory(load), told)
    for name, variant in study.variants.items():
        for arm in variant.arms or study.arms:
            _know(study.recipe(arm, seed=variant.seeds[0], variant=name), offline)
        yield f"variant {name}: {variant.title}; {len(variant.seeds)} seeds"
    if (asked := inspection_of(study)) is not None:
        recipe, request = asked
        yield (
            f"inspection of the untrained model: {(request.limit or 0) * request.k:,} answers "
            f"under {', '.join(request.contexts)}"
        )
    yield _total(resolved, known, len(seeds))


def differences(a: Any, b: Any) -> Any:
    """What of ``b`` is not in ``a``, nested."""
    if isinstance(a, dict) and isinstance(b, dict):
        return {k: differences(a.get(k), v) for k, v in b.items() if a.get(k) != v}
    return b


def notes(recipes: Iterable[Recipe], *, here: bool = True) -> Iterator[str]:
    """What works but is seldom meant, once each, from recipes alone; ``here``: as it would run here."""
    asked = list(recipes)
    if any(unreadable(recipe) for recipe in asked):
        yield UNREADABLE
    if any(uncorrected(recipe) for recipe in asked):
        yield STALE
    if here and any(slow_halves(recipe) for recipe in asked):
        yield SLOW_HALVES


def unreadable(recipe: Recipe) -> bool:
    """True where a context is shown to a model that was never taught to read it."""
    return "environment" in recipe.context.names and recipe.data.type == "lab"


def uncorrected(recipe: Recipe) -> bool:
    """True where answers of older weights are learned from as if they were the policy's own."""
    capped = [term.importance_cap for term in terms(recipe.objective) if term is not None]
    return recipe.train.staleness > 0 and recipe.train.steps > 0 and None in capped


def slow_halves(recipe: Recipe) -> bool:
    """True where a processor is asked for products of bfloat16 and has no instructions for them."""
    model = recipe.model
    if "bfloat16" not in (model.weights_dtype, model.autocast):
        return False
    on_cpu = model.device == "cpu" or (model.device == "auto" and not torch.cuda.is_available())
    return on_cpu and not matmul.has_fast_bf16("cpu")


def _know(recipe: Recipe, offline: bool) -> Survey:
    return look(recipe) if offline else survey(recipe, build(recipe))


def _unchecked(known: Mapping[str, Survey]) -> Iterator[str]:
    """What was not loaded, once each."""
    lines = dict.fromkeys(line for of_arm in known.values() for line in of_arm.unchecked)
    if lines:
        yield "# not checked"
        yield from lines


def _sizes(known: Survey) -> Iterator[str]:
    if known.shape is None:
        yield "model: of unknown size"
    else:
        yield (
            f"model: {known.parameters:,} parameters, {known.trained:,} trained, on {known.device}"
        )
    yield f"context window: {known.lengths.window:,} tokens"
    counted = ", ".join(f"{count:,} {split}" for split, count in known.problems.items())
    yield f"problems: {counted or 'not counted'}"
    mean, longest = known.lengths.mean_prompt, known.lengths.longest_prompt
    told = (
        f"{mean:,.0f} tokens on average, at most {longest:,}" if mean else f"taken as {longest:,}"
    )
    yield f"prompts: {told}"


def _budget(recipe: Recipe, known: Survey) -> Iterator[str]:
    """An arm's answers, tokens and memory."""
    if known.problems:
        budget = Budget.of(recipe, known.problems)
        yield (
            f"{budget.answers:,} answers (at most {budget.tokens:,} tokens), "
            f"{budget.critiques:,} critiques, {budget.optimizer_steps:,} optimizer steps, "
            f"{budget.evaluation_rollouts:,} answers to evaluate"
        )
    steps, rows = recipe.train.steps, step_tokens(recipe, known.lengths)
    yield f"tokens at most (expected): per step, in {steps:,} steps"
    for row in rows:
        about = [f" ({n * row.expected:,})" if row.expected else "" for n in (1, steps)]
        yield f"  {row.name}: {row.at_most:,}{about[0]}, {steps * row.at_most:,}{about[1]}"
    if cost := step_cost(recipe, rows):
        yield f"  critic: at most {cost:,.2f} a step, {steps * cost:,.2f} in all"


def _memory(arm: str, needed: Memory, told: dict[Memory, str]) -> Iterator[str]:
    """The sum, or whose it is if an arm before had the same."""
    if needed in told:
        yield f"memory of one device at its peak: {gib(needed.peak)}, as for {told[needed]}"
        return
    told[needed] = arm
    yield f"memory of one device at its peak: {gib(needed.peak)}"
    parts: tuple[tuple[str, tuple[Item, ...]], ...] = (
        ("always", needed.always), ("learning", needed.learning), ("or sampling", needed.sampling)
    )  # fmt: skip
    for when, items in parts:
        yield f"  {when}: {gib(sum(item.bytes for item in items))}"
        for item in items:
            yield f"    {item.name}: {item.how} = {gib(item.bytes)}"


def _total(recipes: Mapping[str, Recipe], known: Mapping[str, Survey], seeds: int) -> str:
    budgets = [
        Budget.of(recipe, known[arm].problems)
        for arm, recipe in recipes.items()
        if known[arm].problems
    ]
    if len(budgets) < len(recipes):
        return f"main setting, {seeds} seeds; nothing has been spent"
    answers = seeds * sum(budget.answers + budget.evaluation_rollouts for budget in budgets)
    return f"main setting, {seeds} seeds: {answers:,} answers in all; nothing has been spent"
