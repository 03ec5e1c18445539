"""Critiques a trainer's rollouts while it trains, and renders them as contexts of the teacher."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from selfteach.commands.actions import load
from selfteach.commands.critique import recipe_of
from selfteach.config.critic_section import PolicyCriticConfig
from selfteach.config.data_section import Columns
from selfteach.config.recipe import Recipe
from selfteach.errors import RecipeError
from selfteach.integrations.row_problems import problem_of, text_of
from selfteach.prompts.template_set import Templates
from selfteach.protocols import Context, Critic, Verifier
from selfteach.trainer.build import build_arm_context, build_context, build_critique_setup
from selfteach.trainer.preflight import preflight
from selfteach.types import (
    Critique,
    CritiquedRollout,
    CritiqueFailure,
    CritiqueFailureKind,
    Problem,
    Rollout,
    Usage,
)

TOO_LONG = "too_long"
"""The reason of a context with which the teacher's prompt is longer than the trainer allows."""
OTHER = "other"
"""Counts failures of no other kind: a context needs what this rollout does not have."""
KINDS: tuple[str, ...] = (*get_args(CritiqueFailureKind), TOO_LONG, OTHER)
"""The kinds by which failures are counted."""


@dataclass(frozen=True, slots=True)
class SampledCompletion:
    """Holds a completion as a trainer has sampled it."""

    values: Mapping[str, Any]
    """The row of the data set, ``prompt`` included."""
    completion: Any
    """Its text, or messages."""
    token_ids: tuple[int, ...]
    finished: bool
    """False if it was truncated at the token limit."""


@dataclass(frozen=True, slots=True)
class BatchFeedback:
    """Holds the contexts of a batch and what they took."""

    contexts: list[str | None]
    """What the teacher is shown besides the question; None where the critique failed."""
    failures: list[CritiqueFailure | None]
    """Why a rollout has no context; None with one, and for the question alone."""
    usage: Usage


@dataclass(frozen=True)
class CritiqueFeedback:
    """Critiques rollouts and renders contexts. `critique_feedback` builds it from a recipe."""

    critic: Critic
    verify: Verifier
    context: Context
    columns: Columns = field(default_factory=Columns)

    def __call__(self, sampled: Sequence[SampledCompletion]) -> BatchFeedback:
        """Return the contexts of a batch of completions, in order.

        A reply is in the reply cache before it is parsed. Raises `CriticError` for a failure whose
        policy in the recipe is ``stop``, and `DataError` for rows that cannot be read.
        """
        failures: list[CritiqueFailure | None] = [None] * len(sampled)
        contexts: list[str | None] = [None] * len(sampled)
        judged, places, seen = [], [], Counter[str]()
        for place, one in enumerate(sampled):
            problem = problem_of(one.values, place, self.columns)
            if problem is None:
                failures[place] = CritiqueFailure("no answer to compare with")
                continue
            rollout = _rollout(one, problem, seen[problem.id])
            seen[problem.id] += 1
            judged.append((rollout, self.verify(problem, rollout.text)))
            places.append(place)
        critiques = self.critic(judged) if judged else []
        critiqued = [
            CritiquedRollout(rollout, verdict, critique)
            for (rollout, verdict), critique in zip(judged, critiques, strict=True)
        ]
        for place, context in zip(places, self.context(critiqued), strict=True):
            if isinstance(context, CritiqueFailure):
                failures[place] = context
            else:
                contexts[place] = context
        return BatchFeedback(contexts, failures, _usage(critiques))


def critique_feedback(
    recipe: Recipe | str | Path, *, arm: str | None = None, settings: Sequence[str] = ()
) -> CritiqueFeedback:
    """Build the critic and the context of a recipe: a `Recipe`, a file, or a shipped recipe's name.

    It reads the recipe's ``[critic]`` (reply cache, budget, policies of failures), ``[context]``,
    templates and ``[data]`` (how answers are read and split; it needs no problems), and
    ``model.path`` for its tokenizer. The critic's server is checked here. Raises one of
    `selfteach.errors` in one line.
    """
    if not isinstance(recipe, Recipe):
        recipe = recipe_of(load(Path(recipe), settings, arm), arm)
    if recipe.critic is None:
        raise RecipeError("the recipe has no critic: name an arm that has one")
    if isinstance(recipe.critic, PolicyCriticConfig):
        raise RecipeError(
            'critic.type = "policy" is the model that selfteach trains: name a model of its own '
            '(type "local") or a server (type "endpoint")'
        )
    preflight([recipe], critic_only=True)
    setup = build_critique_setup(recipe)
    templates = Templates(recipe.model.templates or setup.task.templates)
    context = build_arm_context(recipe, setup.task, templates) or build_context(
        recipe.context.type, setup.task, templates,
        seed=recipe.seed, alignment=recipe.context.alignment,
    )  # fmt: skip
    return CritiqueFeedback(setup.critic, setup.task.verify, context)


def failure_kind(failure: CritiqueFailure) -> str:
    """Return a failure's kind: one of `KINDS`."""
    return failure.reason if failure.reason in KINDS else OTHER


def _rollout(one: SampledCompletion, problem: Problem, sample: int) -> Rollout:
    ids = one.token_ids or (0,)
    return Rollout(
        problem, sample, (), ids, (0.0,) * len(ids), text_of(one.completion), one.finished, 0
    )


def _usage(critiques: Sequence[Critique | CritiqueFailure]) -> Usage:
    total = Usage()
    for critique in critiques:
        total += critique.usage
    return total
