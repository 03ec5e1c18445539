"""Check that a recipe's templates, tokenizer, problems and answers fit, before a run spends."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace

from selfteach.config.critic_section import LlmCriticConfig
from selfteach.config.data_section import AnswerReading
from selfteach.config.recipe import Recipe
from selfteach.errors import DataError, EngineError, RecipeError
from selfteach.prompts.renderer import Renderer
from selfteach.prompts.template_set import Templates
from selfteach.tasks.task import Task
from selfteach.tasks.verifiers import (
    ExactVerifier,
    MathVerifier,
    ReasoningGymVerifier,
    WithoutAnswers,
)
from selfteach.types import Problem

log = logging.getLogger(__name__)

OVERLONG = "overlong in"
"""Begins the name of a count of overlong prompts; that of their split follows."""
_QUESTION, _CONTEXT, _ROLLOUT = "the question 7319", "the context 2857", "the rollout 6413"
_EVIDENCE = "the evidence 9154"
REFERENCES: Mapping[str, str] = {
    "reference": "reference",
    "other_reference": "reference",
    "partly_aligned": "reference",
    "aligned_reference": "aligned_reference",
}
"""The worked solution that a context shows, by the context's name."""
FORMS: Mapping[str, tuple[str, ...]] = {
    "tag": ("<answer>",),
    "boxed": ("\\boxed",),
    "tag_or_boxed": ("<answer>", "\\boxed"),
}
"""What a prompt says when it asks for an answer that ``data.answer_in`` reads."""


def require_fitting_templates(recipe: Recipe, templates: Templates) -> None:
    """Check that each template shows what it is for, and asks for the answer that is read.

    Raises `RecipeError` for a solver's template without ``{{ question }}``, a teacher's without that
    or ``{{ context }}``, a critic's without question or rollout, and for prompts that ask for another
    form of answer than ``data.answer_in``.
    """
    solver = templates.render("solver", question=_QUESTION)
    _require_shown("solver", solver, {"question": _QUESTION})
    if recipe.context.type != "none":
        teacher = templates.render("teacher", question=_QUESTION, context=_CONTEXT)
        _require_shown("teacher", teacher, {"question": _QUESTION, "context": _CONTEXT})
    if isinstance(recipe.critic, LlmCriticConfig) and templates.has("critic"):
        sees_evidence = recipe.critic.sees_evidence
        shown = {"evidence": _EVIDENCE, "facts": {"error": _EVIDENCE}} if sees_evidence else {}
        messages = templates.critic(_QUESTION, _ROLLOUT, steps=(_ROLLOUT,), finished=True, **shown)
        critic = "\n".join(message["content"] for message in messages)
        _require_shown("critic", critic, {"question": _QUESTION, "answer": _ROLLOUT})
        if sees_evidence and _EVIDENCE not in critic:
            raise RecipeError(
                "critic.sees_evidence = true, and critic.jinja shows neither {{ evidence }} nor "
                '{{ facts }}: choose another template set (model.templates = "code"), or false'
            )
    if isinstance(recipe.data, AnswerReading):
        _require_form(recipe.data.answer_in, solver)


def require_splits(recipe: Recipe, task: Task) -> None:
    """Check that each split that a run uses has problems. Raises `DataError` for the first without."""
    used = {
        "train": recipe.train.steps > 0,
        "validation": recipe.train.steps > 0,
        "test": recipe.evaluation.test,
    }
    for split, is_used in used.items():
        if is_used and not getattr(task, split):
            fix = ", or set evaluation.test = false" if split == "test" else ""
            raise DataError(
                f"the {split} problem set is empty, and the run uses it: name data.{split}, or a "
                f"data.pool that is split{fix}"
            )


def within_context(renderer: Renderer, task: Task, max_length: int, recipe: Recipe) -> Task:
    """Return the task with the problems whose prompts leave room for a rollout.

    With ``data.overlong = "drop"`` the others are left out and counted, by split. Raises `DataError`
    naming the first of them otherwise, or if none of a split is left.
    """
    drop = drops_overlong(recipe)
    room = max_length - recipe.sampling.max_tokens
    splits, counts = {}, dict(task.counts)
    for name in ("train", "validation", "test"):
        problems: tuple[Problem, ...] = getattr(task, name)
        lengths = [_prompt_length(renderer, problem) for problem in problems]
        fitting = [p for p, length in zip(problems, lengths, strict=True) if length <= room]
        splits[name] = tuple(fitting)
        overlong = len(problems) - len(fitting)
        if overlong and not (drop and fitting):
            index = next(i for i, length in enumerate(lengths) if length > room)
            raise DataError(_no_room(problems[index], lengths[index], max_length, recipe, overlong))
        if overlong:
            counts[f"{OVERLONG} {name}"] = overlong
    return replace(task, **splits, counts=counts)


def drops_overlong(recipe: Recipe) -> bool:
    """Return True if the recipe drops problems with overlong prompts."""
    return isinstance(recipe.data, AnswerReading) and recipe.data.overlong == "drop"


def log_overlong(task: Task) -> None:
    """Log how many overlong prompts were left out, a line per split."""
    for name, count in task.counts.items():
        if name.startswith(OVERLONG):
            log.warning("%s: %d prompts that leave no room for a rollout are left out", name, count)


def _prompt_length(renderer: Renderer, problem: Problem) -> int:
    try:
        return len(renderer.solver_prompt(problem))
    except EngineError as error:  # templates may refuse an order of turns
        raise DataError(f"problem {problem.label!r}: {error}") from None


def _no_room(problem: Problem, length: int, window: int, recipe: Recipe, count: int) -> str:
    needed = recipe.sampling.max_tokens
    do = "does 1 other" if count == 2 else f"do {count - 1} others"
    others = f"; so {do} of its split" if count > 1 else ""
    fix = ""
    if isinstance(recipe.data, AnswerReading) and recipe.data.overlong == "stop":
        fix = ': data.overlong = "drop" leaves such problems out'
    return (
        f"problem {problem.label!r} has a prompt of {length} tokens; with a rollout of up to "
        f"{needed} (sampling.max_tokens) it exceeds the context of {window}{others}{fix}"
    )


def require_references(recipe: Recipe, task: Task) -> None:
    """Check that training problems have the worked solutions that contexts and critic are to show.

    Raises `DataError` if none has: nothing could be taught, or the critic would see nothing.
    """
    if recipe.train.steps == 0 or not task.train:
        return
    shown = [REFERENCES.get(name) for name in recipe.context.names]
    if None not in shown and not any(with_reference(task, name) for name in shown if name):
        raise DataError(
            f'context "{recipe.context.type}" shows worked solutions, and none of the '
            f"{len(task.train):,} training problems has one: name their column "
            f"(data.columns.{shown[0]}), or choose another context"
        )
    critic = recipe.critic
    is_shown_solutions = isinstance(critic, LlmCriticConfig) and critic.sees_reference
    if is_shown_solutions and not with_reference(task, "reference"):
        raise DataError(
            "critic.sees_reference = true, and no training problem has a worked solution: name their "
            "column (data.columns.reference), or set it to false"
        )
    if isinstance(critic, LlmCriticConfig) and critic.sees_evidence:
        _require_evidence(task)


def _require_evidence(task: Task) -> None:
    """Raise `RecipeError` for a verifier that runs nothing, and so has no evidence to show."""
    built_in = (ExactVerifier, MathVerifier, ReasoningGymVerifier, WithoutAnswers)
    if isinstance(task.verify, built_in):
        raise RecipeError(
            "critic.sees_evidence = true, and only running an answer gives evidence: set "
            'data.verifier = "code", or set it to false'
        )


def with_reference(task: Task, name: str) -> int:
    """Return the number of training problems that have a worked solution of this name."""
    return sum(name in problem.references for problem in task.train)


def require_embedded(prompts: Iterable[tuple[str, tuple[int, ...]]], embeddings: int) -> None:
    """Check that the ids of labelled prompts are embedded. Raises `DataError` for the first not."""
    for label, ids in prompts:
        if ids and max(ids) >= embeddings:
            raise DataError(
                f"problem {label!r}: its prompt has token {max(ids)}, and the model embeds "
                f"{embeddings} tokens: the tokenizer is not this model's, or has tokens added since"
            )


def _require_shown(name: str, rendered: str, needed: Mapping[str, str]) -> None:
    for variable, value in needed.items():
        if value not in rendered:
            raise RecipeError(
                f"template {name}.jinja does not show {{{{ {variable} }}}}: all prompts would be alike"
            )


def _require_form(answer_in: str, solver: str) -> None:
    wanted = FORMS[answer_in]
    others = [form for forms in FORMS.values() for form in forms if form not in wanted]
    if any(form in solver for form in wanted):
        return
    if other := next((form for form in others if form in solver), None):
        raise RecipeError(
            f'data.answer_in = "{answer_in}" reads {" or ".join(wanted)}, but solver.jinja asks for '
            f"{other}: name model.templates whose solver.jinja asks for it, or change data.answer_in"
        )
