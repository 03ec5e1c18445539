"""What a run samples, scores and asks for, in answers and tokens, from its recipe alone.

Every count is an upper bound: answers at full length, contexts that fill the window, critiques that
are all asked for again. Where prompts and references could be counted there is an estimate too: mean
prompts, contexts as long as a reference or an answer, and critiques asked for once.
"""

from __future__ import annotations

from dataclasses import dataclass

from selfteach.config.critic_section import EndpointConfig, LlmCriticConfig
from selfteach.config.objective_section import terms
from selfteach.config.recipe import Recipe

ASSUMED_PROMPT = 1024
"""Tokens of a prompt where none could be counted: a question of mathematics has less."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens of what a run is made of; None where it could not be counted."""

    window: int
    """Longest sequence, prompt and answer together."""
    longest_prompt: int = ASSUMED_PROMPT
    mean_prompt: float | None = None
    mean_reference: float | None = None
    critic_template: int = 0
    """Of a critic's prompt without question and answer."""


@dataclass(frozen=True, slots=True)
class Budget:
    """Answers of one run; upper bounds."""

    answers: int
    """Sampled to learn from."""
    tokens: int
    """Of these answers, at most."""
    critiques: int
    optimizer_steps: int
    evaluation_rollouts: int

    @classmethod
    def of(cls, recipe: Recipe, problems: dict[str, int]) -> Budget:
        """The budget of a recipe over problem sets of these sizes."""
        train, evaluation = recipe.train, recipe.evaluation
        per_step = min(train.problems_per_step, problems["train"]) * train.group_size
        answers = train.steps * per_step
        points = 0
        if train.steps:
            points = 1 + train.steps // evaluation.every + (train.steps % evaluation.every > 0)
        evaluated = points * problems["validation"] * evaluation.validation_k
        if evaluation.test:
            evaluated += problems["test"] * evaluation.test_k
        return cls(
            answers=answers,
            tokens=answers * recipe.sampling.max_tokens,
            critiques=answers if recipe.critic is not None else 0,
            optimizer_steps=train.steps * train.num_iterations,
            evaluation_rollouts=evaluated,
        )


@dataclass(frozen=True, slots=True)
class Tokens:
    """Tokens of one step: at most, and as expected where lengths are known."""

    name: str
    at_most: int
    expected: int | None = None


def step_tokens(recipe: Recipe, lengths: Lengths) -> list[Tokens]:
    """What one step reads and writes; rows that are nothing are left out."""
    train, sampled = recipe.train, recipe.sampling.max_tokens
    answers = train.problems_per_step * train.group_size
    prompt, mean = lengths.longest_prompt, lengths.mean_prompt
    scored = answers * train.num_iterations

    def row(name: str, times: int, at_most: int, expected: float | None) -> Tokens:
        return Tokens(name, times * at_most, None if expected is None else round(times * expected))

    rows = [
        row("prompts sampled from", train.problems_per_step, prompt, mean),
        row("sampled", answers, sampled, None),
        row("scored by the student", scored, prompt + sampled, plus(mean, sampled)),
    ]
    shown = _shown(recipe, lengths)
    if shown is not None:
        name, at_most, expected = shown
        times = answers * train.num_iterations
        if recipe.teacher.type == "trust_region":
            times *= 2
        rows.append(row(name, times, at_most, expected))
    if isinstance(recipe.critic, LlmCriticConfig):
        rows += _asked(recipe.critic, recipe, lengths, answers)
    return rows


def step_cost(recipe: Recipe, rows: list[Tokens]) -> float:
    """At most, in the currency of the recipe's prices; 0 without a critic that is paid."""
    if not isinstance(recipe.critic, EndpointConfig):
        return 0.0
    by_name = {row.name: row.at_most for row in rows}
    return 1e-6 * (
        by_name["read by the critic"] * recipe.critic.price_prompt
        + by_name["written by the critic"] * recipe.critic.price_completion
    )


def plus(*numbers: int | float | None) -> float | None:
    """The sum, or None if one of them is not known."""
    known = [number for number in numbers if number is not None]
    return float(sum(known)) if len(known) == len(numbers) else None


def _shown(recipe: Recipe, lengths: Lengths) -> tuple[str, int, float | None] | None:
    """What the teacher scores of one answer: with a context, or on the student's own prompt."""
    told, rewarded = terms(recipe.objective)
    sampled, mean = recipe.sampling.max_tokens, lengths.mean_prompt
    name = "scored by the teacher"
    if told is not None:
        by_reference = recipe.context.type in ("reference", "aligned_reference")
        context = lengths.mean_reference if by_reference else float(sampled)
        return name, lengths.window, plus(mean, context, sampled)
    if rewarded is not None and rewarded.kl_coef > 0:
        return name, lengths.longest_prompt + sampled, plus(mean, sampled)
    return None


def _asked(critic: LlmCriticConfig, recipe: Recipe, lengths: Lengths, answers: int) -> list[Tokens]:
    """The critic's tokens, as if it had the solver's tokenizer."""
    sampled, template = recipe.sampling.max_tokens, lengths.critic_template
    prompt = lengths.longest_prompt
    reference = lengths.mean_reference if critic.sees_reference else 0.0
    read = plus(lengths.mean_prompt, reference, sampled, template)
    most = template + prompt + sampled + (lengths.window if critic.sees_reference else 0)
    times = answers * critic.max_attempts
    return [
        Tokens("read by the critic", times * most, None if read is None else round(answers * read)),
        Tokens("written by the critic", times * critic.max_tokens),
    ]
