"""What an inspection is asked for, and from it to a folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from selfteach.commands.inspect.answer_rows import Told, prepare, tell
from selfteach.commands.inspect.folder import (
    Progress,
    Scorers,
    check_contexts,
    position,
    sample_and_mark,
    write_inspection,
)
from selfteach.commands.inspect.labelled import as_answers, read_labelled, require_critic
from selfteach.config.data_section import ORACLE_DATA
from selfteach.config.migrations import run_subfolder
from selfteach.config.recipe import PARTLY_ALIGNED, Recipe
from selfteach.config.schema import merge, parse_setting, validate
from selfteach.errors import CheckpointError, DataError
from selfteach.feedback.critics.journaled_critic import JournaledCritic
from selfteach.prompts.template_set import Templates
from selfteach.protocols import Context
from selfteach.rollout.journaled_engine import problems_by_id
from selfteach.runtime.provenance import collect_provenance
from selfteach.runtime.run_folder import RunFolder, require_empty
from selfteach.trainer.build import Built, build_context
from selfteach.trainer.open_model import named_problems, open_model
from selfteach.trainer.step import verify_and_critique
from selfteach.types import CritiquedRollout, Problem, Rollout, Sampling

TeacherWeights = Literal["given", "initial"]


@dataclass(frozen=True, slots=True)
class Request:
    """Which answers are scored, and under which contexts."""

    contexts: tuple[str, ...]
    problems: str = "validation"
    """Split or file, as a name for the record; the problems themselves are handed over."""
    k: int = 4
    """Answers per problem."""
    limit: int | None = None
    """So many problems at most (of labelled steps: answers); the first ones."""
    seed: int = 0
    teacher: TeacherWeights = "given"
    """Weights behind the self-teacher: the model as given, or those its training began with."""
    labelled: Path | None = None
    """Take answers with labelled steps from this file instead of sampling."""
    recorded: str | None = None
    """Take a run's recorded answers of this name, like ``step_000010`` or ``validation_000000``."""


def inspect(
    built: Built,
    recipe: Recipe,
    request: Request,
    answers: Sequence[Told],
    folder: Path,
    *,
    made: Mapping[str, Any],
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Score answers under the contexts that are asked for and write the folder; its inspection.json."""
    templates = Templates(recipe.model.templates or built.task.templates)
    alignment = recipe.context.alignment
    contexts = {
        name: _context(name, built, templates, seed=request.seed, alignment=alignment)
        for name in check_contexts(request.contexts)
    }
    language = "lab" if recipe.data.type == "lab" else "english"
    prepared = prepare(built, answers, contexts, language=language)
    student = built.components.policy.score
    teacher = built.components.teacher.score if request.teacher == "initial" else student
    about = {
        "contexts": list(contexts),
        "alignment": alignment if PARTLY_ALIGNED in contexts else None,
        "problems": str(request.labelled or request.problems),
        "answers_are": _origin(request),
        "recorded": request.recorded,
        "k": request.k,
        "limit": request.limit,
        "seed": request.seed,
        "teacher": request.teacher,
        "critic": None if recipe.critic is None else recipe.critic.model_dump(mode="json"),
        "first_error_from": _one_of(sorted({told.source for told in answers if told.source})),
        "sampling_temperature": recipe.sampling.temperature,
        "made": dict(made),
    }
    return write_inspection(built, prepared, Scorers(student, teacher), folder, about, progress)


def sampled(
    built: Built, recipe: Recipe, request: Request, problems: Sequence[Problem]
) -> list[Told]:
    """Fresh answers to the first problems, marked."""
    sampling = Sampling(
        request.k, recipe.sampling.temperature, recipe.sampling.max_tokens, request.seed
    )
    chosen = problems[: request.limit]
    return tell(built, sample_and_mark(built, chosen, sampling))


def recorded(built: Built, request: Request, run: RunFolder) -> list[Told]:
    """A run's recorded answers, with the critiques that it has of them.

    Raises `CheckpointError` if there are no answers of this name, `DataError` if the problems are
    not the recipe's.
    """
    name, task = str(request.recorded), built.task
    known = problems_by_id([*task.train, *task.validation, *task.test])
    critiques = run.load_critiques(int(name[5:])) if name.removeprefix("step_").isdigit() else {}
    critiqued: list[CritiquedRollout] = []
    for path in sorted(run_subfolder(run.path, "rollouts").glob(f"{name}.*.jsonl")):
        try:
            rollouts = run.load_rollouts(path.stem, known) or []
        except KeyError as missing:
            raise DataError(f"{path}: the recipe's data has no problem {missing}") from None
        critiqued += _critiqued(built, rollouts, critiques)
    if not critiqued:
        have = sorted(
            {p.name.split(".")[0] for p in run_subfolder(run.path, "rollouts").glob("*.jsonl")}
        )
        raise CheckpointError(
            f"{run.path} has no answers {name!r}; it has: {', '.join(have[:3] + have[-3:]) or 'none'}"
        )
    if request.limit is not None:
        first = list(dict.fromkeys(m.rollout.problem.id for m in critiqued))[: request.limit]
        critiqued = [m for m in critiqued if m.rollout.problem.id in first]
    return tell(built, critiqued)


def _critiqued(
    built: Built, rollouts: Sequence[Rollout], critiques: Mapping[tuple[str, int], Any]
) -> list[CritiquedRollout]:
    """Verify rollouts; those without a saved critique are critiqued."""
    critic = built.components.critic
    saved = None if critic is None else JournaledCritic(critic, critiques)
    return verify_and_critique(replace(built.components, critic=saved), rollouts)


def _context(
    name: str, built: Built, templates: Templates, *, seed: int, alignment: float
) -> Context:
    """A context by name; a position in the name goes before the recipe's."""
    kind, place = name.partition("@")[0], position(name)
    at = alignment if place is None else place
    return build_context(kind, built.task, templates, seed=seed, alignment=at)


def _origin(request: Request) -> str:
    if request.labelled:
        return "labelled"
    return "recorded" if request.recorded else "sampled"


def _one_of(names: Sequence[str]) -> str | None:
    return " and ".join(names) or None


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
    built, resolved = open_model(
        Path(what), what, recipe, lambda own: _for_inspection(own, request, settings)
    )
    lost: dict[str, int] = {}
    if request.labelled:
        answers, lost = as_answers(built, rows)
    elif request.recorded:
        checkpoint_of_it = (Path(what) / "state.json").exists()
        run = Path(what).parent.parent if checkpoint_of_it else Path(what)
        answers = recorded(built, request, RunFolder(run))
    else:
        problems, _ = named_problems(built, request.problems)
        answers = sampled(built, resolved, request, problems)
    made = {"model": what, "lost": lost, **collect_provenance()}
    return inspect(built, resolved, request, answers, folder, made=made, progress=progress)


def _for_inspection(own: Recipe, request: Request, settings: Sequence[str]) -> Recipe:
    """A recipe with what the caller sets, a critic where a program can be one, the teacher wanted."""
    plain = own.model_dump(mode="json")
    for setting in map(parse_setting, settings):
        plain = merge(plain, setting)
    if request.labelled:
        require_critic(request.contexts, plain["critic"] is not None)
    elif plain["critic"] is None and plain["data"]["type"] in ORACLE_DATA:
        plain["critic"] = {"type": "oracle"}
    plain["teacher"] = {"type": "initial" if request.teacher == "initial" else "live"}
    return validate(Recipe, plain, where="recipe")
