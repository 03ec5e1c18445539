"""What a notebook needs in one line each; the rest of the package is as public as this."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from selfteach import checkpoint
from selfteach.build import Built, build
from selfteach.config import Recipe
from selfteach.errors import CheckpointError, DataError
from selfteach.estimates import bootstrap_mean
from selfteach.evaluate import Evaluation, evaluate
from selfteach.problem_sets.reading import read_file
from selfteach.run_folder import RunFolder
from selfteach.settings import merge, validate
from selfteach.types import Problem, Sampling

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
    built, resolved = _open(Path(what), what, recipe)
    chosen, split = _problems(built, problems)
    sampling = Sampling(
        samples=k or resolved.evaluation.test_k,
        temperature=resolved.evaluation.temperature,
        max_tokens=resolved.evaluation.max_tokens or resolved.sampling.max_tokens,
        seed=seed,
    )
    result = evaluate(
        built.parts.engine, built.parts.verify, chosen, sampling,
        split=split, batch_answers=resolved.sampling.batch_answers, same=built.task.form.same,
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


def _open(path: Path, what: str, recipe: Recipe | None) -> tuple[Built, Recipe]:
    if (path / "state.json").exists():
        return _from_checkpoint(path, path.parent.parent, recipe)
    if (path / "study.json").exists():
        raise CheckpointError(f"{path} is a study; name one of its runs, {path}/runs/ARM/seed_N")
    if (path / "environment.json").exists():
        saved = checkpoint.checkpoints(RunFolder(path).checkpoints)
        if not saved:
            raise CheckpointError(f"{path} has no checkpoint yet")
        return _from_checkpoint(saved[-1], path, recipe)
    resolved = recipe or Recipe.model_validate({"train": {"steps": 0}})
    changed = {"model": {"path": what}, "train": {"steps": 0}}
    resolved = validate(Recipe, merge(resolved.model_dump(mode="json"), changed), where="recipe")
    return build(resolved), resolved


def _from_checkpoint(saved: Path, run: Path, recipe: Recipe | None) -> tuple[Built, Recipe]:
    own = validate(Recipe, RunFolder(run).config(), where=str(run))
    resolved = recipe.model_copy(update={"model": own.model}) if recipe else own
    built = build(resolved)
    checkpoint.load_weights(saved, built.parts.policy)
    return built, resolved


def _problems(built: Built, name: str) -> tuple[tuple[Problem, ...], str]:
    if name in ("train", "validation", "test"):
        return built.task.problems(name), name
    path = Path(name)
    if path.suffix not in (".jsonl", ".json", ".parquet"):
        raise DataError(
            f"--problems {name!r}: write train, validation, test, or name a .jsonl or .parquet file"
        )
    return read_file(path), path.stem
