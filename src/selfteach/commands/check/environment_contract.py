"""Run the contract of an environment of a user's own on made-up turns, for `selfteach check`."""

from __future__ import annotations

from collections.abc import Sequence

from selfteach.config.recipe import Recipe
from selfteach.episodes import EnvironmentReply, Turn
from selfteach.errors import PartError
from selfteach.protocols import Environment
from selfteach.rollout.episode_engine import broken_reply
from selfteach.runtime.part_calls import call
from selfteach.tasks.custom_tasks import broken_verdict
from selfteach.trainer.build_environment import build_environments
from selfteach.types import Rollout

SEEDS = (1, 1)
"""Two episodes with the same seed must show the same."""


def check_environment(label: str, recipe: Recipe, rollouts: Sequence[Rollout]) -> None:
    """Run an episode twice on each made-up answer, with the same seed.

    Raises `PartError` if it raises, returns what no environment returns, or differs.
    """
    environments = build_environments(recipe)
    assert environments is not None
    for rollout in rollouts:
        first, second = (_episode(label, environments.make(), rollout, seed) for seed in SEEDS)
        if first != second:
            raise PartError(
                f"{label}: two episodes of problem {rollout.problem.label!r} with the same seed and "
                f"the same turn showed {first} and {second}"
            )


def _episode(
    label: str, environment: Environment, rollout: Rollout, seed: int
) -> tuple[str, EnvironmentReply]:
    """Return what an episode of one turn shows; its results are checked."""
    shown = call(environment, label, "reset", _broken_observation, rollout.problem, seed)
    reply = call(environment, label, "step", _broken_reply, Turn(rollout.text))
    call(environment, label, "verdict", _broken_verdict)
    return shown, reply


def _broken_observation(result: object, *_: object) -> str | None:
    if isinstance(result, str):
        return None
    return f"returned a {type(result).__name__} and not a text, which is shown behind the question"


def _broken_reply(result: object, *_: object) -> str | None:
    broken = broken_reply(result)
    return None if broken is None else broken.removeprefix("step ")


def _broken_verdict(result: object, *_: object) -> str | None:
    return None if result is None else broken_verdict(result)
