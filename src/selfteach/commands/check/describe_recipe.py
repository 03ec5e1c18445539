"""Describe a recipe for `selfteach check`: resolved values, sizes, token and memory budgets."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from selfteach.commands.check.fit_notes import fit_notes
from selfteach.commands.check.hub_environment_contract import check_environment_rewards
from selfteach.commands.check.part_contracts import Critiqued, check_parts
from selfteach.commands.check.sizes import RunSizes, device_load, measure, measure_offline
from selfteach.commands.check.tokens import (
    Budget,
    evaluation_cost,
    step_cost,
    step_tokens,
)
from selfteach.commands.study.run_study import inspection_of
from selfteach.config.critic_section import EndpointConfig
from selfteach.config.objective_section import terms
from selfteach.config.part_names import unanchored
from selfteach.config.recipe import Recipe
from selfteach.config.recipe_file import Study
from selfteach.models import matmul
from selfteach.models.loading import choose_device
from selfteach.tasks.task import describe_problems
from selfteach.trainer.build import build
from selfteach.trainer.device_load import free_memory
from selfteach.trainer.device_memory import Item, Memory, gib, memory

FEEDBACK_NOT_READ = (
    "note: the lab's base models do not read environment feedback: it teaches them almost nothing"
)
"""Measured: docs/concepts.md."""
SLOW_BF16 = (
    "note: this CPU has no instructions for bfloat16 matmul, which takes many times as long as float32 "
    'here: use model.autocast = "auto" (or false) and weights_dtype = "float32"'
)
FLOAT32_UNDER_ADAPTERS = (
    "note: the weights under the adapters do not train and are float32; with "
    'model.weights_dtype = "auto" they are bfloat16 here: half the memory, and a fraction of the time '
    "(autocast casts all of them at every pass); adapters stay float32"
)
NOTHING_TO_TEACH = (
    "note: the teacher is shown no context and has the student's weights and prompt, so the loss is 0 "
    "at the first step: a null control; model.teacher_system, thinking or a context gives it something "
    "to teach"
)
STALE_WITHOUT_CAP = (
    "note: train.staleness is above 0 without objective.importance_cap: rollouts of older weights are "
    "trained on without an importance ratio; 2.0 is a usual cap"
)


def describe_study(study: Study, *, offline: bool = False) -> Iterator[str]:
    """Yield lines that print the resolved recipe of every arm, its sizes, memory and budget.

    Builds every arm, so that every error of a build is raised here. ``offline`` measures what is on
    this machine instead and lists what is not (`sizes.measure_offline`). Raises what `build` raises.
    """
    seeds = study.study.seeds
    recipes = {arm: study.recipe(arm, seed=seeds[0]) for arm in study.arms}
    first = next(iter(recipes))
    plain = {arm: recipe.model_dump(mode="json") for arm, recipe in recipes.items()}
    yield f"# {first}, resolved"
    yield json.dumps(plain[first], indent=2)
    for arm in list(recipes)[1:]:
        yield f"# {arm}: what differs from {first}"
        yield json.dumps(differences(plain[first], plain[arm]), indent=2)
    critiqued = Critiqued()
    sizes = {arm: _measure(recipe, offline, critiqued) for arm, recipe in recipes.items()}
    yield from _unchecked(sizes)
    if parts := dict.fromkeys(line for of_arm in sizes.values() for line in of_arm.parts):
        yield "# parts of your own"
        yield from parts
    yield from notes(recipes.values(), here=not offline)
    yield from fit_notes(recipes, sizes, here=not offline)
    yield "# sizes"
    yield from _sizes(sizes[first])
    if (task := sizes[first].task) is not None:
        yield from describe_problems(task)
    described: dict[Memory, str] = {}
    for arm, recipe in recipes.items():
        yield f"# {arm}, per seed"
        yield from _budget(recipe, sizes[arm])
        available = None if offline else free_memory(recipe.model.device)
        load = device_load(recipe, sizes[arm], available)
        if load is not None and recipe.train.steps:
            yield from _memory(arm, memory(load), described)
    for name, variant in study.variants.items():
        for arm in variant.arms or study.arms:
            recipe = study.recipe(arm, seed=variant.seeds[0], variant=name)
            _measure(recipe, offline, critiqued)
        yield f"variant {name}: {variant.title}; {len(variant.seeds)} seeds"
    if (inspection := inspection_of(study)) is not None:
        _, request = inspection
        yield (
            f"inspection of the untrained model: {(request.limit or 0) * request.k:,} rollouts "
            f"under {', '.join(request.contexts)}"
        )
    yield _total(recipes, sizes, len(seeds))


def differences(a: Any, b: Any) -> Any:
    """Return the part of ``b`` that differs from ``a``, nested dictionaries included."""
    if isinstance(a, dict) and isinstance(b, dict):
        return {k: differences(a.get(k), v) for k, v in b.items() if a.get(k) != v}
    return b


def notes(recipes: Iterable[Recipe], *, here: bool = True) -> Iterator[str]:
    """Yield a line for each valid but seldom intended setting; ``here``: also what this CPU lacks."""
    checked = list(recipes)
    if any(feedback_not_read(recipe) for recipe in checked):
        yield FEEDBACK_NOT_READ
    if any(stale_without_cap(recipe) for recipe in checked):
        yield STALE_WITHOUT_CAP
    if any(nothing_to_teach(recipe) for recipe in checked):
        yield NOTHING_TO_TEACH
    if here and any(float32_under_adapters(recipe) for recipe in checked):
        yield FLOAT32_UNDER_ADAPTERS
    if here and any(slow_bf16(recipe) for recipe in checked):
        yield SLOW_BF16


def feedback_not_read(recipe: Recipe) -> bool:
    """Return True where a context is shown to a model that was not pretrained to read it."""
    return "environment" in recipe.context.names and recipe.data.type == "lab"


def stale_without_cap(recipe: Recipe) -> bool:
    """Return True where rollouts of older weights are trained on as if they were on-policy."""
    caps = [term.importance_cap for term in terms(recipe.objective) if term is not None]
    may_have_cap = not recipe.sampling.cuts  # under which a cap is refused
    return recipe.train.staleness > 0 and recipe.train.steps > 0 and None in caps and may_have_cap


def nothing_to_teach(recipe: Recipe) -> bool:
    """Return True where the teacher has the student's prompt and, at first, its weights."""
    model = recipe.model
    distils = terms(recipe.objective)[0] is not None and recipe.train.steps > 0
    same_prompt = model.teacher_system in (None, model.system)
    same_thinking = model.thinking.student == model.thinking.teacher
    return distils and recipe.context.type == "none" and same_prompt and same_thinking


def float32_under_adapters(recipe: Recipe) -> bool:
    """Return True where frozen weights are float32 on a device with bfloat16 matmul."""
    model = recipe.model
    if model.lora is None or model.weights_dtype != "float32" or recipe.train.steps == 0:
        return False
    kind = choose_device("auto").type if model.device == "auto" else model.device
    return matmul.has_fast_bf16(kind)


def slow_bf16(recipe: Recipe) -> bool:
    """Return True where matmul would run in bfloat16 on a CPU without instructions for it."""
    model = recipe.model
    if "bfloat16" not in (model.weights_dtype, model.autocast):
        return False
    on_cpu = model.device == "cpu" or (model.device == "auto" and not torch.cuda.is_available())
    return on_cpu and not matmul.has_fast_bf16("cpu")


def _measure(recipe: Recipe, offline: bool, critiqued: Critiqued) -> RunSizes:
    if offline:
        return measure_offline(recipe)
    built = build(recipe)
    sizes = measure(recipe, built)
    parts = [*check_parts(recipe, built, critiqued), *check_environment_rewards(recipe, built)]
    return dataclasses.replace(sizes, parts=tuple(parts))


def _unchecked(sizes: Mapping[str, RunSizes]) -> Iterator[str]:
    """Yield what was not loaded, each line once."""
    lines = dict.fromkeys(line for of_arm in sizes.values() for line in of_arm.unchecked)
    if lines:
        yield "# not checked"
        yield from lines


def _sizes(sizes: RunSizes) -> Iterator[str]:
    if sizes.shape is None:
        yield "model: of unknown size"
    else:
        yield f"model: {sizes.parameters:,} parameters, {sizes.trained:,} trained, on {sizes.device}"
    yield f"context window: {sizes.lengths.window:,} tokens"
    counts = ", ".join(f"{count:,} {split}" for split, count in sizes.problems.items())
    yield f"problems: {counts or 'not counted'}"
    mean, longest = sizes.lengths.mean_prompt, sizes.lengths.longest_prompt
    lengths = (
        f"{mean:,.0f} tokens on average, at most {longest:,}"
        if mean
        else f"assumed to be {longest:,} tokens"
    )
    yield f"prompts: {lengths}"


def _budget(recipe: Recipe, sizes: RunSizes) -> Iterator[str]:
    """Yield an arm's rollouts, critiques, optimizer steps and tokens."""
    if sizes.problems:
        budget = Budget.of(recipe, sizes.problems)
        most = "up to " if recipe.sampling.dynamic_rounds else ""
        yield (
            f"{most}{budget.rollouts:,} rollouts (at most {budget.tokens:,} tokens), "
            f"{budget.critiques:,} critiques, {budget.optimizer_steps:,} optimizer steps, "
            f"{budget.evaluation_rollouts:,} rollouts to evaluate"
        )
    if (environment := recipe.environment) is not None:
        yield (
            f"episodes with {unanchored({'type': environment.type})['type']}: at most "
            f"{environment.max_turns} turns of {recipe.sampling.max_tokens:,} tokens, and the replies"
        )
    steps, rows = recipe.train.steps, step_tokens(recipe, sizes.lengths)
    yield f"tokens at most (expected): per step, in {steps:,} steps"
    for row in rows:
        expected = [f" ({n * row.expected:,})" if row.expected else "" for n in (1, steps)]
        yield f"  {row.name}: {row.at_most:,}{expected[0]}, {steps * row.at_most:,}{expected[1]}"
    if cost := step_cost(recipe, rows):
        yield f"  {_paid(recipe)}: at most {cost:,.2f} a step, {steps * cost:,.2f} in all"
    if sizes.problems and (cost := evaluation_cost(recipe, sizes.lengths)):
        rollouts = Budget.of(recipe, sizes.problems).evaluation_rollouts
        yield f"  judges in evaluations: at most {rollouts * cost:,.2f} in all"


def _paid(recipe: Recipe) -> str:
    """Return who is paid in a step: the critic, judges, or both."""
    judged = recipe.reward is not None and len(recipe.reward.judges) > 0
    critics = ["critic"] if isinstance(recipe.critic, EndpointConfig) else []
    return " and ".join([*critics, *(["judges"] if judged else [])])


def _memory(arm: str, needed: Memory, described: dict[Memory, str]) -> Iterator[str]:
    """Yield the memory items, or the name of an earlier arm that needs the same."""
    if needed in described:
        yield f"memory of one device at its peak: {gib(needed.peak)}, as for {described[needed]}"
        return
    described[needed] = arm
    yield f"memory of one device at its peak: {gib(needed.peak)}"
    phases: tuple[tuple[str, tuple[Item, ...]], ...] = (
        ("always", needed.always), ("training", needed.training), ("or sampling", needed.sampling)
    )  # fmt: skip
    for phase, items in phases:
        yield f"  {phase}: {gib(sum(item.bytes for item in items))}"
        for item in items:
            yield f"    {item.name}: {item.arithmetic} = {gib(item.bytes)}"


def _total(recipes: Mapping[str, Recipe], sizes: Mapping[str, RunSizes], seeds: int) -> str:
    budgets = [
        Budget.of(recipe, sizes[arm].problems)
        for arm, recipe in recipes.items()
        if sizes[arm].problems
    ]
    if len(budgets) < len(recipes):
        return f"main setting, {seeds} seeds; nothing has been spent"
    rollouts = seeds * sum(budget.rollouts + budget.evaluation_rollouts for budget in budgets)
    return f"main setting, {seeds} seeds: {rollouts:,} rollouts in all; nothing has been spent"
