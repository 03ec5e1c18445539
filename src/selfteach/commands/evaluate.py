"""`selfteach evaluate`: Avg@k, Pass@k and Maj@k of a run, a checkpoint or a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from selfteach.config.recipe import Recipe
from selfteach.evaluation.evaluation_record import Evaluation
from selfteach.evaluation.evaluator import evaluate
from selfteach.evaluation.statistics import bootstrap_mean
from selfteach.trainer.open_model import named_problems, open_model
from selfteach.types import Sampling

RESAMPLES = 10_000


def evaluate_model(
    what: str,
    *,
    recipe: Recipe | None = None,
    problems: str = "validation",
    k: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Evaluate a run, a checkpoint, or a plain model on a split or a file of problems.

    ``what`` is a run folder (its newest checkpoint, or its final model), one of its checkpoints, or
    whatever ``model.path`` of a recipe may be; a plain model of the lab needs no recipe. Returns the
    measures of `evaluate.Evaluation` as ``{"mean", "ci95"}`` over problems, the sizes, and the
    evaluation itself. Raises one of `selfteach.errors`.
    """
    built, resolved = open_model(Path(what), what, recipe)
    chosen, split = named_problems(built, problems)
    sampling = Sampling(
        samples=k or resolved.evaluation.test_k,
        temperature=resolved.evaluation.temperature,
        max_tokens=resolved.evaluation.max_tokens or resolved.sampling.max_tokens,
        seed=seed,
    )
    result = evaluate(
        built.components.engine, built.components.verify, chosen, sampling,
        split=split, same=built.task.answer_format.equivalent,
    )  # fmt: skip
    return summary(result, what)


def summary(evaluation: Evaluation, what: str) -> dict[str, Any]:
    """An evaluation's measures with 95 % bootstrap intervals over problems."""
    measures = {}
    for name, values_P in evaluation.per_problem().items():
        interval = bootstrap_mean(values_P[None], resamples=RESAMPLES, seed=0)
        measures[name] = {"mean": interval.mean, "ci95": [interval.low, interval.high]}
    return {
        "what": what,
        "split": evaluation.split,
        "problems": len(evaluation.problem_ids),
        "k": evaluation.k,
        **measures,
        "evaluation": evaluation.to_json(),
    }
