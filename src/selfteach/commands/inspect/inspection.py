"""Inspect a model: score the same rollouts under several contexts and write the folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from selfteach.commands.inspect.answer_rows import LocatedRollout, locate_errors, prepare
from selfteach.commands.inspect.folder import (
    Scorers,
    ScoringProgress,
    check_contexts,
    position,
    sample_and_critique,
    write_inspection,
)
from selfteach.commands.inspect.labelled import located_rollouts, read_labelled, require_critic
from selfteach.config.migrations import migrate_recipe, run_subfolder
from selfteach.config.part_names import anchored, is_custom
from selfteach.config.part_section import CustomPart
from selfteach.config.recipe import PARTLY_ALIGNED, Recipe
from selfteach.config.schema import merge, parse_setting, validate
from selfteach.errors import CheckpointError
from selfteach.feedback.critics.journaled_critic import JournaledCritic
from selfteach.prompts.template_set import Templates
from selfteach.protocols import Context
from selfteach.rollout.journaled_engine import problems_by_id
from selfteach.rollout.sampling_settings import training_sampling
from selfteach.runtime.folder_start import require_empty
from selfteach.runtime.provenance import collect_provenance
from selfteach.runtime.run_folder import RunFolder
from selfteach.trainer.build import Built, build_context
from selfteach.trainer.custom_components import build_custom_context
from selfteach.trainer.open_model import named_problems, open_model
from selfteach.trainer.step import verify_and_critique
from selfteach.types import CritiquedRollout, Problem, Rollout

TeacherWeights = Literal["given", "initial"]


@dataclass(frozen=True, slots=True)
class InspectionRequest:
    """Describes which rollouts are scored, and under which contexts."""

    contexts: tuple[str, ...]
    problems: str | Path = "validation"
    """Split or file the problems come from."""
    k: int = 4
    """Rollouts per problem."""
    limit: int | None = None
    """Use only the first so many problems (with ``labelled``: rollouts)."""
    seed: int = 0
    teacher: TeacherWeights = "given"
    """Weights of the teacher: the model as given, or the initial weights of its training."""
    labelled: str | Path | None = None
    """Read rollouts with labelled steps from this file instead of sampling."""
    recorded: str | None = None
    """Read a run's recorded rollouts of this name, like ``step_000010`` or ``validation_000000``."""
    parts: Mapping[str, CustomPart] = field(default_factory=dict)
    """Contexts of one's own with their options, by a name in ``contexts``; a name that is not here is
    imported without options, or with those that the recipe gives it."""


def inspect(
    built: Built,
    recipe: Recipe,
    request: InspectionRequest,
    rollouts: Sequence[LocatedRollout],
    folder: Path,
    *,
    made: Mapping[str, Any],
    progress: ScoringProgress | None = None,
) -> dict[str, Any]:
    """Score rollouts under the requested contexts and write the folder; return its inspection.json."""
    templates = Templates(recipe.model.templates or built.task.templates)
    alignment = recipe.context.alignment
    parts = _custom_contexts(recipe, request)
    contexts = dict[str, Context]()
    for name in check_contexts(request.contexts, parts):
        part = parts.get(name)
        contexts[name if part is None else part.label] = (
            _context(name, built, templates, seed=request.seed, alignment=alignment)
            if part is None
            else build_custom_context(part, built.task, templates, seed=request.seed)
        )
    language = "lab" if recipe.data.type == "lab" else "english"
    prepared = prepare(built, rollouts, contexts, language=language)
    sources = sorted({rollout.source for rollout in rollouts if rollout.source})
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
        "first_error_from": " and ".join(sources) or None,
        "sampling_temperature": recipe.sampling.temperature,
        "made": dict(made),
    }
    return write_inspection(built, prepared, Scorers(student, teacher), folder, about, progress)


def sample_rollouts(
    built: Built, recipe: Recipe, request: InspectionRequest, problems: Sequence[Problem]
) -> list[LocatedRollout]:
    """Sample and critique rollouts of the first problems, and locate their errors."""
    sampling = training_sampling(recipe, request.k, request.seed)
    critiqued = sample_and_critique(built, problems[: request.limit], sampling)
    return locate_errors(built, critiqued)


def recorded_rollouts(
    built: Built, request: InspectionRequest, run: RunFolder
) -> list[LocatedRollout]:
    """Read a run's recorded rollouts and critiques, and locate the errors.

    Raises `CheckpointError` if there are no rollouts of this name, or if the recipe does not have their
    problems.
    """
    name, task = str(request.recorded), built.task
    problems = problems_by_id([*task.train, *task.validation, *task.test])
    critiques = run.load_critiques(int(name[5:])) if name.removeprefix("step_").isdigit() else {}
    critiqued: list[CritiquedRollout] = []
    for path in sorted(run_subfolder(run.path, "rollouts").glob(f"{name}.*.jsonl")):
        rollouts = run.load_rollouts(path.stem, problems) or []
        critiqued += _critiqued(built, rollouts, critiques)
    if not critiqued:
        files = run_subfolder(run.path, "rollouts").glob("*.jsonl")
        names = sorted({path.name.split(".")[0] for path in files})
        some = ", ".join(names[:3] + names[-3:]) or "none"
        raise CheckpointError(f"{run.path} has no rollouts {name!r}; it has: {some}")
    if request.limit is not None:
        first = list(dict.fromkeys(c.rollout.problem.id for c in critiqued))[: request.limit]
        critiqued = [c for c in critiqued if c.rollout.problem.id in first]
    return locate_errors(built, critiqued)


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
    """Build a context by name; a dial position in the name overrides the recipe's."""
    kind, named_position = name.partition("@")[0], position(name)
    if named_position is not None:
        alignment = named_position
    return build_context(kind, built.task, templates, seed=seed, alignment=alignment)


def _custom_contexts(recipe: Recipe | None, request: InspectionRequest) -> dict[str, CustomPart]:
    """Return the requested contexts of one's own by their name in the request."""
    parts = dict(request.parts)
    of_recipe = None if recipe is None else recipe.context.custom_part
    for name in request.contexts:
        if of_recipe is not None and name in (of_recipe.label, of_recipe.type):
            parts.setdefault(name, of_recipe)
        elif name not in parts and is_custom("context", name):
            part = CustomPart.model_validate(anchored({"type": name}, Path.cwd()))
            same = of_recipe is not None and part.type == of_recipe.type
            parts[name] = of_recipe if same and of_recipe is not None else part
    return parts


def _origin(request: InspectionRequest) -> str:
    if request.labelled:
        return "labelled"
    return "recorded" if request.recorded else "sampled"


def inspect_model(
    model: str | Path,
    request: InspectionRequest,
    folder: str | Path,
    *,
    recipe: Recipe | None = None,
    settings: Sequence[str] = (),
    progress: ScoringProgress | None = None,
) -> dict[str, Any]:
    """Score the same rollouts of a model under several contexts and write them to a folder.

    ``model`` as in `evaluate_model`; ``settings`` are ``key=value`` changes of the recipe, also of the
    recipe of a run. Without a critic in the recipe the task's oracle critiques. Returns what
    ``inspection.json`` holds; ``docs/inspection.md`` describes the folder. Raises one of
    `selfteach.errors`.
    """
    model_path, folder = Path(model), Path(folder)
    labels = [name for name in request.contexts if ":" in name]  # a run's recipe may have them
    check_contexts(request.contexts, [*_custom_contexts(recipe, request), *labels])
    require_empty(folder)
    rows = read_labelled(Path(request.labelled))[: request.limit] if request.labelled else []
    built, resolved = open_model(
        model_path, str(model), recipe, lambda base: _for_inspection(base, request, settings)
    )
    check_contexts(request.contexts, _custom_contexts(resolved, request))
    lost: dict[str, int] = {}
    if request.labelled:
        rollouts, lost = located_rollouts(built, rows)
    elif request.recorded:
        is_checkpoint = (model_path / "state.json").exists()
        run = model_path.parent.parent if is_checkpoint else model_path
        rollouts = recorded_rollouts(built, request, RunFolder(run))
    else:
        problems, _ = named_problems(built, str(request.problems), resolved)
        rollouts = sample_rollouts(built, resolved, request, problems)
    made = {"model": str(model), "lost": lost, **collect_provenance()}
    return inspect(built, resolved, request, rollouts, folder, made=made, progress=progress)


def _for_inspection(recipe: Recipe, request: InspectionRequest, settings: Sequence[str]) -> Recipe:
    """Return the recipe with settings, an oracle critic if it has none, and the requested teacher."""
    plain = recipe.model_dump(mode="json")
    for setting in map(parse_setting, settings):
        plain = merge(plain, migrate_recipe(setting, "--set"))
    if request.labelled:
        require_critic(request.contexts, plain["critic"] is not None)
    elif plain["critic"] is None and validate(Recipe, plain, where="recipe").has_oracle:
        plain["critic"] = {"type": "oracle"}
    if plain["objective"]["type"] == "grpo":  # its penalty would have a teacher of its own
        plain["objective"]["kl_coef"] = 0.0
    plain["teacher"] = {"type": "initial" if request.teacher == "initial" else "live"}
    return validate(Recipe, plain, where="recipe")
