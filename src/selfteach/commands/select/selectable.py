"""Refuse recipes from which no problems can be selected, before anything is built."""

from __future__ import annotations

from selfteach.config.data_section import SelectConfig
from selfteach.config.recipe import Recipe
from selfteach.config.reward_section import EnvironmentRewardConfig
from selfteach.errors import RecipeError


def require_selectable(recipe: Recipe, config: SelectConfig) -> None:
    """Raise `RecipeError` for settings that do not fit, or if an environment of `verifiers` decides.

    The files that are written have no such environment. A critic solves no questions of episodes, since
    it would have neither tools nor replies.
    """
    if config.critic and recipe.critic is None:
        raise RecipeError(
            "select.critic = true needs a critic and the recipe has none: add [critic], "
            "or set [select] critic = false"
        )
    if recipe.runs_hub_episodes:
        raise RecipeError(
            "select writes problems to files, which have no environment to run episodes: select from "
            'another source of data than "verifiers", with another [environment]'
        )
    functions = recipe.reward.functions if recipe.reward is not None else ()
    if any(isinstance(one, EnvironmentRewardConfig) for one in functions):
        raise RecipeError(
            "select writes problems to files, which have no environment to reward them: name "
            "data.verifier, and leave the environment out of [reward]"
        )
    if config.critic and config.critic_test == "solution" and recipe.environment is not None:
        raise RecipeError(
            'select.critic_test = "solution": the critic would have to solve questions of '
            '[environment] without its tools and replies: set critic_test = "critique"'
        )
