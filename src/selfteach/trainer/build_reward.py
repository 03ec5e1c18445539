"""Builds the rewards of a recipe from its ``[reward]`` section."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from transformers import TrainerState

from selfteach.config.recipe import Recipe
from selfteach.config.reward_section import (
    CustomRewardConfig,
    EnvironmentRewardConfig,
    JudgeConfig,
    RewardFunctionConfig,
    VerifierRewardConfig,
)
from selfteach.errors import CriticError, RecipeError
from selfteach.feedback.critics.reply_cache import CachedModel, ReplyCache, default_path
from selfteach.feedback.rewards.combined_reward import CombinedReward, Source, VerdictReward
from selfteach.feedback.rewards.environment_reward import EnvironmentReward, EnvironmentScorer
from selfteach.feedback.rewards.llm_judge import LlmJudge
from selfteach.feedback.rewards.reward_function import RewardFunction
from selfteach.prompts.renderer import Renderer
from selfteach.tasks.task import Task
from selfteach.types import Rollout


def build_reward(recipe: Recipe, task: Task, renderer: Renderer) -> CombinedReward | None:
    """Build the rewards of a recipe; None without ``[reward]``.

    Raises `PartError`, `CriticError` or `RecipeError` before any reward is computed.
    """
    if recipe.reward is None:
        return None
    sources = [one for config in recipe.reward.functions for one in _sources(config, task)]
    _require_distinct(sources)
    for judge in sources:
        if isinstance(judge, LlmJudge):
            _require_template(judge, task)
    return CombinedReward(
        sources, recipe.reward.success, renderer.completion, trainer_states(recipe, len(task.train))
    )


def trainer_states(recipe: Recipe, problems: int) -> Callable[[int], TrainerState]:
    """Return what makes the ``trainer_state`` of reward functions from the number of updates."""
    train = recipe.train
    per_epoch = max(1, problems) / min(train.problems_per_step, max(1, problems))

    def state(update: int) -> TrainerState:
        return TrainerState(
            epoch=update / train.num_iterations / per_epoch,
            global_step=update,
            max_steps=train.steps * train.num_iterations,
            num_train_epochs=-int(-train.steps // per_epoch),
            logging_steps=1,
            eval_steps=recipe.evaluation.every,
            save_steps=train.checkpoint_every,
            train_batch_size=train.problems_per_step * train.group_size,
        )

    return state


def _sources(config: RewardFunctionConfig, task: Task) -> list[Source]:
    match config:
        case VerifierRewardConfig():
            return [VerdictReward(config.name, config.weight)]
        case CustomRewardConfig():
            return [RewardFunction.build(config)]
        case JudgeConfig():
            return [LlmJudge(_judge_model(config), config)]
        case EnvironmentRewardConfig():
            assert task.environment is not None, "a recipe with such a reward has an environment"
            scorer = EnvironmentScorer(task.environment)
            return [
                EnvironmentReward(name, config.weight * weight, scorer)
                for name, weight in task.environment.weights.items()
            ]


def _require_distinct(sources: Sequence[Source]) -> None:
    """Raise `RecipeError` if a reward has the name of a function of the environment."""
    names = Counter(source.name for source in sources)
    name, count = names.most_common(1)[0]
    if count > 1:
        raise RecipeError(
            f"reward.functions: the environment has a reward {name!r} too: give yours another name"
        )


def _judge_model(config: JudgeConfig) -> CachedModel:
    try:
        from selfteach.feedback.critics.endpoint import EndpointModel
    except ImportError:
        raise CriticError(
            'a reward of type "judge" needs OpenAI\'s client: pip install "selfteach[endpoint]"'
        ) from None
    path = Path(config.reply_cache).expanduser() if config.reply_cache else default_path()
    return CachedModel(EndpointModel(config), ReplyCache(path, config.key("reply_cache")))


def _require_template(judge: LlmJudge, task: Task) -> None:
    """Render the judge's prompt once, so that an undefined name is found before anything is sampled."""
    for problem in (*task.train, *task.validation, *task.test)[:1]:
        judge.messages(Rollout(problem, 0, (), (0,), (0.0,), "an answer", True, 0))
