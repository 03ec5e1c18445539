"""Print what student, teacher and critic are shown, for `selfteach check --show-prompts`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from selfteach.config.critic_section import LlmCriticConfig
from selfteach.config.recipe import Recipe
from selfteach.models.loading import build_renderer, load_tokenizer
from selfteach.models.model_path import resolve
from selfteach.prompts.renderer import Renderer
from selfteach.prompts.template_set import Templates
from selfteach.tasks.task import Task, load_task
from selfteach.trainer.build import build_arm_context
from selfteach.trainer.build_environment import environment_tools
from selfteach.types import (
    Critique,
    CritiquedRollout,
    CritiqueFailure,
    CritiqueStep,
    Problem,
    Rollout,
    Verdict,
)

ROLLOUT = "‹the rollout's text›"
_STEPS = (
    CritiqueStep("‹a step that the critique keeps›", "kept", "‹a step that the critique keeps›"),
    CritiqueStep("‹the corrected step›", "fixed", "‹the step with the first error›"),
    CritiqueStep("‹a step that the critique adds›", "new"),
)


def shown_prompts(recipes: Mapping[str, Recipe]) -> Iterator[str]:
    """Yield lines with the first training problem's prompts of each arm, control tokens included.

    What a run will fill in is in angle quotes: nothing is sampled, and no critic is asked. A prompt
    that an arm shares with an earlier one is named, not repeated. Raises what a run's build raises.
    """
    printed: dict[tuple[str, str], str] = {}
    for arm, recipe in recipes.items():
        for title, text in _prompts(recipe):
            if (earlier := printed.get((title, text))) is not None:
                yield f"# {arm}: {title}: as for {earlier}"
                continue
            printed[title, text] = arm
            yield f"# {arm}: {title}"
            yield text


def _prompts(recipe: Recipe) -> Iterator[tuple[str, str]]:
    task = load_task(
        recipe.data, resolve(recipe.model.path), reward=recipe.reward,
        episodes=recipe.runs_hub_episodes,
    )  # fmt: skip
    templates = Templates(recipe.model.templates or task.templates)
    renderer = build_renderer(
        recipe.model, load_tokenizer(recipe.model), templates, environment_tools(recipe, task)
    )
    templates = renderer.templates
    problem = task.problems("train")[0]
    yield "the student is shown", renderer.shown(renderer.solver_prompt(problem))
    yield "the teacher is shown", _teacher(recipe, task, templates, renderer, problem)
    if isinstance(recipe.critic, LlmCriticConfig) and templates.has("critic"):
        yield "the critic is shown", _critic(recipe.critic, templates, problem)


def _teacher(
    recipe: Recipe, task: Task, templates: Templates, renderer: Renderer, problem: Problem
) -> str:
    context = build_arm_context(recipe, task, templates)
    if context is None:
        return "nothing: this arm has no teacher"
    others = [other for other in task.train if other.id != problem.id][:1]
    critique = Critique("D", _STEPS, problem.answer, 1) if recipe.critic is not None else None
    critiqued = [
        CritiquedRollout(
            Rollout(shown, sample, (), (0,), (0.0,), ROLLOUT, True, 0),
            Verdict(correct, True, "‹answer›", None if correct else "‹the verifier's message›"),
            critique,
        )
        for shown in (problem, *others)
        for sample, correct in enumerate((False, True))
    ]
    first = context(critiqued)[0]
    if isinstance(first, CritiqueFailure):
        return f"nothing for this problem: {first.reason}"
    return renderer.shown(renderer.teacher_prompt(problem, first))


def _critic(config: LlmCriticConfig, templates: Templates, problem: Problem) -> str:
    solution = None
    if config.solves_first:
        solution = "‹the critic's own solution›"
    elif config.sees_reference:
        solution = problem.references.get("reference")
    ran = {"evidence": "‹what running the rollout has shown›", "facts": {}}
    messages = templates.critic(
        problem.transcript, ROLLOUT, steps=(ROLLOUT,), final="‹answer›", finished=True,
        reference=solution, **(ran if config.sees_evidence else {}),
    )  # fmt: skip
    return "\n".join(f"[{message['role']}]\n{message['content']}" for message in messages)
