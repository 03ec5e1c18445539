"""Count the tokens with which prompts begin alike, which trainer and sampler compute once.

The student's prompts are those of all training problems. The teacher's are rendered for a few of them,
each under two contexts that differ from the start: what both begin with does not depend on the rollout.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import takewhile
from math import inf
from statistics import fmean

from selfteach.commands.check.tokens import TeacherPrompts
from selfteach.config.recipe import Recipe
from selfteach.prompts.renderer import Renderer
from selfteach.types import Problem

ONE_TEXT = ("none", "reference", "aligned_reference")
"""Contexts that show all rollouts of a problem the same text, unless a template shows the rollout."""
CONTEXTS = ("0 first", "1 second")
"""Two contexts without a common start, in place of critiques."""
NUM_PROBLEMS = 8
"""Problems for which the teacher's prompts are rendered."""


def count_prompts(prompts: Iterable[Sequence[int]], first: int) -> tuple[list[int], int]:
    """Return the lengths of prompts, and how many tokens the ``first`` so many of them begin with.

    Of a single prompt it is not known what others share with it: 0.
    """
    lengths, start = list[int](), list[int]()
    for number, prompt in enumerate(prompts):
        lengths.append(len(prompt))
        if number < first:
            pairs = zip(start if number else prompt, prompt, strict=False)
            start = [token for token, _ in takewhile(lambda pair: pair[0] == pair[1], pairs)]
    return lengths, len(start) if min(first, len(lengths)) > 1 else 0


def teacher_prompts(
    recipe: Recipe, renderer: Renderer, problems: Sequence[Problem]
) -> TeacherPrompts | None:
    """Return lengths of the teacher's prompts; None where these are the student's or of two kinds."""
    if not recipe.shows_context or recipe.context.fallback is not None:
        return None
    pairs = [_rendered(recipe, renderer, problem) for problem in problems[:NUM_PROBLEMS]]
    prompts = [prompt for pair in pairs for prompt in pair]
    lengths, of_all = count_prompts(prompts, len(prompts))
    if recipe.context.type in ONE_TEXT and all(first == second for first, second in pairs):
        context, of_group = 0.0, inf
    else:  # two contexts of unknown words may be the same tokens: then nothing is known to be shared
        context = fmean(len(renderer.encode_answer(text)) - 1 for text in CONTEXTS)
        of_group = fmean(count_prompts(pair, 2)[1] if len({*pair}) > 1 else 0 for pair in pairs)
    return TeacherPrompts(
        mean=fmean(lengths) - context,
        shared_by_all=of_all if len(pairs) > 1 else 0,
        shared_by_group=of_group,
    )


def _rendered(
    recipe: Recipe, renderer: Renderer, problem: Problem
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return a problem's teacher prompts for two rollouts that have nothing in common."""
    kind, templates = recipe.context.type, renderer.templates
    contexts: Sequence[str | None] = CONTEXTS
    if kind == "none":
        contexts = [None, None]
    elif kind in ONE_TEXT and kind in problem.references:
        contexts = [
            templates.context(
                kind, critique=None, references=problem.references, correct=correct, attempt=attempt
            )
            for correct, attempt in zip((True, False), CONTEXTS, strict=True)
        ]
    first, second = (renderer.teacher_prompt(problem, context) for context in contexts)
    return first, second
