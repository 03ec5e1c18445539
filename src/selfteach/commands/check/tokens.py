"""Count the rollouts, critiques and tokens of a run from its recipe, before it starts.

Every count is an upper bound: rollouts of full length, contexts that fill the window, every critique
requested as often as the recipe allows. Where prompts and references could be counted there is an
expected value too: mean prompts, contexts as long as a reference or a rollout, one request a critique.
"""

from __future__ import annotations

from dataclasses import dataclass

from selfteach.config.critic_section import EndpointConfig, LlmCriticConfig
from selfteach.config.objective_section import terms
from selfteach.config.recipe import Recipe
from selfteach.config.reward_section import JudgeConfig
from selfteach.config.served_model import ServedModelConfig

CHARACTERS_PER_TOKEN = 4
"""Of a template whose tokens are not counted."""
EVIDENCE_TOKENS = (60, 600)
"""Tokens of what running an answer shows: usually, and at most."""
ASSUMED_PROMPT = 1024
"""Prompt length in tokens where none could be counted: mathematics questions are shorter."""


@dataclass(frozen=True, slots=True)
class TeacherPrompts:
    """Holds lengths in tokens of the teacher's prompts under a context."""

    mean: float
    """With a problem's reference where the context shows it, else without the context."""
    shared_by_all: int
    """With which the prompts of all problems begin."""
    shared_by_group: float
    """With which those of one problem's rollouts begin; infinite: they are the same."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """Holds lengths in tokens; None where they could not be counted."""

    window: int
    """Longest sequence, prompt and completion together."""
    longest_prompt: int = ASSUMED_PROMPT
    mean_prompt: float | None = None
    mean_reference: float | None = None
    critic_template: int = 0
    """Length of a critic's prompt without question and rollout."""
    shared_prompt: int = 0
    """Tokens with which the prompts of all problems begin."""
    teacher: TeacherPrompts | None = None
    """None where they were not counted, or are the student's prompts."""


@dataclass(frozen=True, slots=True)
class Budget:
    """Holds upper bounds on what one run samples and trains."""

    rollouts: int
    """Sampled for training."""
    tokens: int
    """Tokens of these rollouts, at most."""
    critiques: int
    optimizer_steps: int
    evaluation_rollouts: int

    @classmethod
    def of(cls, recipe: Recipe, problems: dict[str, int]) -> Budget:
        """Compute the budget of a recipe; ``problems`` is the number of problems by split."""
        train, evaluation = recipe.train, recipe.evaluation
        per_step = min(most_problems(recipe), problems["train"]) * train.group_size
        rollouts = train.steps * per_step
        evaluations = 0
        if train.steps:
            evaluations = 1 + train.steps // evaluation.every + (train.steps % evaluation.every > 0)
        evaluated = evaluations * problems["validation"] * evaluation.validation_k
        if evaluation.test:
            evaluated += problems["test"] * evaluation.test_k
        return cls(
            rollouts=rollouts,
            tokens=rollouts * recipe.most_sampled,
            critiques=rollouts if recipe.critic is not None else 0,
            optimizer_steps=train.steps * train.num_iterations,
            evaluation_rollouts=evaluated,
        )


def most_problems(recipe: Recipe) -> int:
    """Return the number of problems that one step samples at most, in all its rounds."""
    return recipe.train.problems_per_step * (1 + recipe.sampling.dynamic_rounds)


@dataclass(frozen=True, slots=True)
class Tokens:
    """Holds one kind of token count of a step: an upper bound, and the expected value where known."""

    name: str
    at_most: int
    expected: int | None = None


def step_tokens(recipe: Recipe, lengths: Lengths) -> list[Tokens]:
    """Count the tokens that one step samples, scores and exchanges with the critic."""
    train, completion = recipe.train, recipe.most_sampled
    rollouts = train.problems_per_step * train.group_size
    prompt, mean = lengths.longest_prompt, lengths.mean_prompt
    scored = rollouts * train.num_iterations

    def row(name: str, times: int, at_most: int, expected: float | None) -> Tokens:
        return Tokens(name, times * at_most, None if expected is None else round(times * expected))

    problems, in_rounds = most_problems(recipe), recipe.sampling.dynamic_rounds > 0
    rows = [
        row("prompts sampled from", problems, prompt, None if in_rounds else mean),
        row("sampled", problems * train.group_size, completion, None),
        row("scored by the student", scored, prompt + completion, plus(mean, completion)),
    ]
    teacher_tokens = _teacher_tokens(recipe, lengths)
    if teacher_tokens is not None:
        at_most, expected = teacher_tokens
        times = rollouts * train.num_iterations
        if recipe.scoring_teacher.type == "trust_region":
            times *= 2
        rows.append(row("scored by the teacher", times, at_most, expected))
    if isinstance(recipe.critic, LlmCriticConfig):
        rows += _critic_tokens(recipe.critic, recipe, lengths, rollouts)
    for judge in recipe.reward.judges if recipe.reward is not None else ():
        rows += _judge_tokens(judge, recipe, lengths, problems * train.group_size)
    return rows


def step_cost(recipe: Recipe, rows: list[Tokens]) -> float:
    """Return the highest cost of a step, in the currency of the recipe's prices; 0 if free."""
    by_name = {row.name: row.at_most for row in rows}
    priced: dict[str, ServedModelConfig] = {}
    if isinstance(recipe.critic, EndpointConfig):
        priced["the critic"] = recipe.critic
    for judge in recipe.reward.judges if recipe.reward is not None else ():
        priced[f"the reward {judge.name}"] = judge
    return 1e-6 * sum(
        by_name[f"read by {who}"] * model.price_prompt
        + by_name[f"written by {who}"] * model.price_completion
        for who, model in priced.items()
    )


def _judge_tokens(
    judge: JudgeConfig, recipe: Recipe, lengths: Lengths, rollouts: int
) -> list[Tokens]:
    """Count a judge's tokens as if it had the policy's tokenizer; evaluations are not among them."""
    template = len(judge.prompt + (judge.system or "")) // CHARACTERS_PER_TOKEN
    completion, times = recipe.sampling.max_tokens, rollouts * judge.max_attempts
    mean = plus(lengths.mean_prompt, template, completion)
    most = template + lengths.longest_prompt + completion
    expected = None if mean is None else round(rollouts * mean)
    return [
        Tokens(f"read by the reward {judge.name}", times * most, expected),
        Tokens(f"written by the reward {judge.name}", times * judge.max_tokens),
    ]


def evaluation_cost(recipe: Recipe, lengths: Lengths) -> float:
    """Return the highest cost of one evaluated rollout: 0 where rewards do not decide success."""
    if recipe.reward is None or recipe.reward.success is None:
        return 0.0
    return 1e-6 * sum(
        read.at_most * judge.price_prompt + written.at_most * judge.price_completion
        for judge in recipe.reward.judges
        for read, written in [_judge_tokens(judge, recipe, lengths, 1)]
    )


def plus(*numbers: int | float | None) -> float | None:
    """Return the sum, or None if one of the numbers is None."""
    counted = [number for number in numbers if number is not None]
    return float(sum(counted)) if len(counted) == len(numbers) else None


def _teacher_tokens(recipe: Recipe, lengths: Lengths) -> tuple[int, float | None] | None:
    """Count what the teacher scores of one rollout: under a context, or under the student's prompt."""
    distillation, grpo = terms(recipe.objective)
    completion, mean = recipe.most_sampled, lengths.mean_prompt
    if distillation is not None or recipe.shows_context:
        by_reference = recipe.context.type in ("reference", "aligned_reference")
        context = lengths.mean_reference if by_reference else float(completion)
        return lengths.window, plus(mean, context, completion)
    if grpo is not None and grpo.kl_coef > 0:
        return lengths.longest_prompt + completion, plus(mean, completion)
    return None


def _critic_tokens(
    critic: LlmCriticConfig, recipe: Recipe, lengths: Lengths, rollouts: int
) -> list[Tokens]:
    """Count the critic's tokens as if it had the policy's tokenizer."""
    completion, template = recipe.sampling.max_tokens, lengths.critic_template
    prompt = lengths.longest_prompt
    solution, longest_solution = 0.0, 0
    if critic.sees_reference:
        solution, longest_solution = lengths.mean_reference, lengths.window
    elif critic.solves_first:  # requested after the student's prompt: at most once per rollout
        solution, longest_solution = (
            plus(lengths.mean_prompt, completion),
            prompt + critic.max_tokens,
        )
    evidence, most_evidence = EVIDENCE_TOKENS if critic.sees_evidence else (0, 0)
    expected = plus(lengths.mean_prompt, solution, completion, template, evidence)
    most = template + prompt + completion + longest_solution + most_evidence
    times = rollouts * critic.max_attempts
    return [
        Tokens(
            "read by the critic",
            times * most,
            None if expected is None else round(rollouts * expected),
        ),
        Tokens(
            "written by the critic", (times + rollouts * critic.solves_first) * critic.max_tokens
        ),
    ]
