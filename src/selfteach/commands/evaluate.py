"""Evaluate a run, a checkpoint or a model: Avg@k, Pass@k and Maj@k with intervals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from selfteach.config.recipe import Recipe
from selfteach.errors import RecipeError
from selfteach.evaluation.evaluation_record import Evaluation, bounds_of
from selfteach.evaluation.evaluator import evaluate
from selfteach.evaluation.intervals import mean_interval
from selfteach.rollout.sampling_settings import evaluation_sampling
from selfteach.trainer.open_model import named_problems, open_model


def evaluate_model(
    model: str | Path,
    *,
    recipe: Recipe | None = None,
    problems: str | Path = "validation",
    k: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Evaluate a run, a checkpoint, or a plain model on a split or a file of problems.

    ``model`` is a run folder (its newest checkpoint), one of its checkpoints, or anything that
    ``model.path`` of a recipe may be; a model of the lab needs no recipe. ``problems`` is train,
    validation, test, or a file of problems; ``k`` is the number of rollouts per problem, by
    default ``evaluation.test_k``. Returns each measure of `Evaluation` in percent as ``{"mean",
    "ci95"}`` over problems, the number of problems, k, and the evaluation itself. Raises one of
    `selfteach.errors`.
    """
    built, resolved = open_model(Path(model), str(model), recipe)
    chosen, split = named_problems(built, str(problems), resolved)
    if resolved.evaluation.temperature == 0 and (k or 1) > 1:
        raise RecipeError(
            f"k = {k}: evaluation.temperature = 0 is greedy, and all rollouts of a problem would be "
            "the same: leave k out, or set a temperature"
        )
    sampling = evaluation_sampling(resolved, k or resolved.evaluation.test_k, seed)
    result = evaluate(
        built.components.engine, built.components.verify, chosen, sampling,
        split=split, same=built.task.answer_format.equivalent,
    )  # fmt: skip
    return summary(result, str(model))


def summary(evaluation: Evaluation, model: str) -> dict[str, Any]:
    """Return the measures of an evaluation with 95 % intervals over problems."""
    measures = {}
    for name, values_P in evaluation.per_problem().items():
        interval = mean_interval([values_P], bounds=bounds_of(name))
        measures[name] = {"mean": interval.mean, "ci95": [interval.low, interval.high]}
    return {
        "what": model,
        "split": evaluation.split,
        "problems": len(evaluation.problem_ids),
        "k": evaluation.k,
        **measures,
        "evaluation": evaluation.to_json(),
    }
