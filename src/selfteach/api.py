"""What a notebook needs in one line each; the rest of the package is as public as this."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from selfteach import checkpoint
from selfteach.build import Built, build
from selfteach.config import Recipe
from selfteach.environment import environment
from selfteach.errors import CheckpointError, DataError
from selfteach.estimates import bootstrap_mean
from selfteach.evaluate import evaluate
from selfteach.evaluation import Evaluation
from selfteach.inspection import request as asking
from selfteach.inspection.folder import Progress, check_contexts
from selfteach.inspection.labelled import as_answers, read_labelled, require_critic
from selfteach.inspection.request import Request
from selfteach.problem_sets.reading import read_file
from selfteach.run_folder import RunFolder, require_empty
from selfteach.settings import merge, parse_setting, validate
from selfteach.study import MARKED_BY_PROGRAM
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


def inspect_model(
    what: str,
    request: Request,
    folder: Path,
    *,
    recipe: Recipe | None = None,
    settings: Sequence[str] = (),
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Score the same answers of a model under several contexts and write them to a folder.

    ``what`` as in `evaluate_model`; ``settings`` are ``key=value`` on the recipe, a run's own too.
    Without a critic in the recipe the task's oracle is asked. Returns what ``inspection.json`` holds;
    ``docs/inspection.md`` describes the folder. Raises one of `selfteach.errors`.
    """
    check_contexts(request.contexts)
    require_empty(folder)
    rows = read_labelled(request.labelled)[: request.limit] if request.labelled else []
    built, resolved = _open(
        Path(what), what, recipe, lambda own: _for_inspection(own, request, settings)
    )
    lost: dict[str, int] = {}
    if request.labelled:
        answers, lost = as_answers(built, rows)
    elif request.recorded:
        checkpoint_of_it = (Path(what) / "state.json").exists()
        run = Path(what).parent.parent if checkpoint_of_it else Path(what)
        answers = asking.recorded(built, request, RunFolder(run))
    else:
        problems, _ = _problems(built, request.problems)
        answers = asking.sampled(built, resolved, request, problems)
    made = {"model": what, "lost": lost, **environment()}
    return asking.inspect(built, resolved, request, answers, folder, made=made, progress=progress)


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


def _for_inspection(own: Recipe, request: Request, settings: Sequence[str]) -> Recipe:
    """A recipe with what the caller sets, a critic where a program can be one, the teacher wanted."""
    plain = own.model_dump(mode="json")
    for setting in map(parse_setting, settings):
        plain = merge(plain, setting)
    if request.labelled:
        require_critic(request.contexts, plain["critic"] is not None)
    elif plain["critic"] is None and plain["data"]["type"] in MARKED_BY_PROGRAM:
        plain["critic"] = {"type": "oracle"}
    plain["teacher"] = {"type": "initial" if request.teacher == "initial" else "live"}
    return validate(Recipe, plain, where="recipe")


def _open(
    path: Path, what: str, recipe: Recipe | None, adapt: Callable[[Recipe], Recipe] = lambda r: r
) -> tuple[Built, Recipe]:
    """The parts behind a run, a checkpoint or a model; ``adapt`` has the last say on the recipe."""
    if (path / "state.json").exists():
        return _from_checkpoint(path, path.parent.parent, recipe, adapt)
    if (path / "study.json").exists():
        raise CheckpointError(f"{path} is a study; name one of its runs, {path}/runs/ARM/seed_N")
    if (path / "environment.json").exists():
        saved = checkpoint.checkpoints(RunFolder(path).checkpoints)
        if not saved:
            raise CheckpointError(f"{path} has no checkpoint yet")
        return _from_checkpoint(saved[-1], path, recipe, adapt)
    resolved = recipe or Recipe.model_validate({"train": {"steps": 0}})
    changed = {"model": {"path": what}, "train": {"steps": 0}}
    resolved = validate(Recipe, merge(resolved.model_dump(mode="json"), changed), where="recipe")
    resolved = adapt(resolved)
    return build(resolved), resolved


def _from_checkpoint(
    saved: Path, run: Path, recipe: Recipe | None, adapt: Callable[[Recipe], Recipe]
) -> tuple[Built, Recipe]:
    own = validate(Recipe, RunFolder(run).config(), where=str(run))
    resolved = adapt(recipe.model_copy(update={"model": own.model}) if recipe else own)
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
