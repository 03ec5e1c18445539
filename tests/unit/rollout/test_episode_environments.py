"""Environments of episodes: they begin with a seed, are closed in every case, and may fail."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
from model_families import with_tools
from scripted_environment import ScriptedEnvironment, ScriptedTurns

from selfteach.commands.forecast.teacher_samples import sample_teacher
from selfteach.episodes import EnvironmentReply
from selfteach.errors import EngineError
from selfteach.prompts.renderer import Renderer
from selfteach.prompts.template_set import Templates
from selfteach.prompts.tool_calls import TOOL_FORMATS
from selfteach.rollout.episode_engine import EpisodeEngine, EpisodeLimits
from selfteach.rollout.prompt_request import PromptRequest
from selfteach.runtime.run_folder import RunFolder
from selfteach.runtime.seeds import EpisodeKey, episode_seed
from selfteach.tasks.environments.calculator import TOOL
from selfteach.types import Problem, Rollout, Sampling

P = Problem("p", "What is 6 * 7?", "42")
SAMPLING = Sampling(2, 1.0, 200, 3)
CALL = TOOL_FORMATS["hermes"].form(TOOL)


class Made:
    """Makes environments with one script after another; the first is only asked for its tools."""

    def __init__(self, *scripts: Sequence[EnvironmentReply], observation: object = "") -> None:
        self._scripts, self._observation = cycle(scripts or [()]), observation
        self._first = True
        self.episodes: list[ScriptedEnvironment] = []

    def __call__(self) -> ScriptedEnvironment:
        if self._first:
            self._first = False
            return ScriptedEnvironment(tools=[TOOL])
        steps = next(self._scripts)
        made = ScriptedEnvironment(steps, tools=[TOOL], observation=self._observation)
        self.episodes.append(made)
        return made


def renderer() -> Renderer:
    return Renderer(with_tools("qwen3"), Templates("lab"), tools=[TOOL])


def engine(
    made: Made, *turns: str, kind: type[ScriptedTurns] = ScriptedTurns, **limits: Any
) -> EpisodeEngine:
    """Return an engine that begins one environment after another."""
    scripted = kind(renderer(), {("p", n): turns for n in range(2)})
    return EpisodeEngine(scripted, renderer(), made, EpisodeLimits(threads=1, **limits))


def events(rollout: Rollout) -> list[str]:
    return [segment.event or "turn" for segment in rollout.segments]


def test_where_no_environment_can_begin_nothing_is_sampled() -> None:
    made = Made(observation=ConnectionError("the server\nis down"))
    with pytest.raises(EngineError) as error:
        engine(made).generate([P], SAMPLING)
    assert "none of the 2 environments" in str(error.value)
    assert "the server is down" in str(error.value) and "\n" not in str(error.value)
    assert [one.closed for one in made.episodes] == [1, 1]


class Dying(ScriptedTurns):
    def complete(self, requests: Sequence[PromptRequest], sampling: Sampling) -> list[Rollout]:
        raise EngineError("the model is gone")


def test_environments_are_closed_whatever_ends_a_batch() -> None:
    made = Made([EnvironmentReply(("4",))])
    with pytest.raises(EngineError, match="gone"):
        engine(made, kind=Dying).generate([P], SAMPLING)
    assert [one.closed for one in made.episodes] == [1, 1]
    made = Made([EnvironmentReply(("4",))])
    engine(made, CALL, "42").generate([P], SAMPLING)
    assert [one.closed for one in made.episodes] == [1, 1]


def test_a_message_that_the_template_cannot_append_ends_its_episode_alone() -> None:
    """Qwen3 removes thoughts when the user writes, and leaves them in place while tools reply."""
    observed, replied = EnvironmentReply(("Look!",), "observation"), EnvironmentReply(("42",))
    made = Made([observed], [replied])
    broken, other = engine(made, CALL, "42").generate([P], SAMPLING)
    assert events(broken) == ["turn", "observation", "failed"]
    assert "rewrites earlier turns" in broken.segments[-1].text
    assert broken.verdict is not None and broken.verdict.reward is None
    assert events(other) == ["turn", "tool_result", "turn"]
    assert [one.closed for one in made.episodes] == [1, 1]


def test_the_teacher_plays_the_episodes_that_it_was_shown(tmp_path: Path) -> None:
    """Its prompt has an environment's first message: the environment must be that of the rollout."""
    made = Made(observation="The door is shut.")
    episodes = engine(made, "42")
    rollouts = episodes.generate([P], SAMPLING)
    seeds = [one.seed for one in made.episodes]
    assert seeds == [episode_seed(P, EpisodeKey(3, n, 0)) for n in range(2)]
    made.episodes.clear()
    prompts = {rollout.key: rollout.prompt_ids for rollout in rollouts}
    taught = sample_teacher(
        episodes, RunFolder(tmp_path), "teacher", rollouts, prompts, Sampling(1, 1.0, 200, 3),
        batch_size=4, progress=lambda done, total: None,
    )  # fmt: skip
    assert [one.seed for one in made.episodes] == seeds
    assert [one.observation for one in taught["p", 0]] == ["The door is shut."]
    with pytest.raises(EngineError, match="shows something before the first turn"):
        episodes.complete([PromptRequest(P, rollouts[0].prompt_ids, (0,))], SAMPLING)


def test_a_seed_by_problem_is_the_same_for_its_episodes_and_at_every_step() -> None:
    made = Made()
    episodes = engine(made, "42", seed_by="problem")
    episodes.generate([P], SAMPLING)
    episodes.load_weights([], 5)
    episodes.generate([P], SAMPLING)
    assert len({one.seed for one in made.episodes}) == 1
    other = Problem("r", "q", "a")
    assert episode_seed(other, EpisodeKey(3, 0, 0), "problem") != made.episodes[0].seed
