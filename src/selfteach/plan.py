"""What a recipe would do and cost, before anything is spent."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from selfteach.build import Built, build
from selfteach.config import Recipe
from selfteach.recipes import Study
from selfteach.study import inspection_of


@dataclass(frozen=True, slots=True)
class Budget:
    """Upper bounds of what one run samples and learns from."""

    answers: int
    """Sampled to learn from."""
    tokens: int
    """Of these answers, at most."""
    critiques: int
    optimizer_steps: int
    evaluation_answers: int

    @classmethod
    def of(cls, recipe: Recipe, problems: dict[str, int]) -> Budget:
        """The budget of a recipe over problem sets of these sizes."""
        train, evaluation = recipe.train, recipe.evaluation
        per_step = min(train.problems_per_step, problems["train"]) * train.answers_per_problem
        answers = train.steps * per_step
        points = 0
        if train.steps:
            points = 1 + train.steps // evaluation.every + (train.steps % evaluation.every > 0)
        evaluated = points * problems["validation"] * evaluation.validation_k
        if evaluation.test:
            evaluated += problems["test"] * evaluation.test_k
        return cls(
            answers=answers,
            tokens=answers * recipe.sampling.max_tokens,
            critiques=answers if recipe.critic is not None else 0,
            optimizer_steps=train.steps * train.updates_per_batch,
            evaluation_answers=evaluated,
        )


def describe_study(study: Study) -> Iterator[str]:
    """Lines that tell the resolved recipe, sizes and budget. Builds every arm, so that whatever can
    fail fails here. Raises what `build.build` raises.
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
    total = 0
    for arm, recipe in resolved.items():
        built = build(recipe)
        sizes = {s: len(getattr(built.task, s)) for s in ("train", "validation", "test")}
        budget = Budget.of(recipe, sizes)
        total += len(seeds) * (budget.answers + budget.evaluation_answers)
        if arm == first:
            yield "# sizes"
            yield from _sizes(built, sizes)
            yield "# budget per seed"
        yield (
            f"{arm}: {budget.answers:,} answers (at most {budget.tokens:,} tokens), "
            f"{budget.critiques:,} critiques, {budget.optimizer_steps:,} optimizer steps, "
            f"{budget.evaluation_answers:,} answers to evaluate"
        )
    for name, variant in study.variants.items():
        for arm in variant.arms or study.arms:
            build(study.recipe(arm, seed=variant.seeds[0], variant=name))
        yield f"variant {name}: {variant.title}; {len(variant.seeds)} seeds"
    if (asked := inspection_of(study)) is not None:
        recipe, request = asked
        yield (
            f"inspection of the untrained model: {(request.limit or 0) * request.k:,} answers "
            f"under {', '.join(request.contexts)}"
        )
    yield f"main setting, {len(seeds)} seeds: {total:,} answers in all; nothing has been spent"


def differences(a: Any, b: Any) -> Any:
    """What of ``b`` is not in ``a``, nested."""
    if isinstance(a, dict) and isinstance(b, dict):
        return {k: differences(a.get(k), v) for k, v in b.items() if a.get(k) != v}
    return b


def _sizes(built: Built, problems: dict[str, int]) -> Iterator[str]:
    policy = built.parts.policy
    parameters = sum(p.numel() for p in policy.model.parameters())
    trained = sum(p.numel() for p in policy.trainable.values())
    yield f"model: {parameters:,} parameters, {trained:,} of them trained, on {policy.device}"
    yield f"context window: {built.parts.max_length:,} tokens"
    counted = ", ".join(f"{count:,} {split}" for split, count in problems.items())
    yield f"problems: {counted}"
