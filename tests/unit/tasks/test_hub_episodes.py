"""Environments of `verifiers` run as episodes of several turns; with the library, and its shape."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from model_families import with_tools
from scripted_environment import ScriptedTurns
from verifiers_environments import CLASSIC, EPISODES, TASKSET, shaped_library

from selfteach.config.recipe import Recipe
from selfteach.config.schema import validate
from selfteach.episodes import EnvironmentReply, Turn
from selfteach.errors import EngineError, RecipeError, SelfteachError
from selfteach.prompts.renderer import Renderer
from selfteach.prompts.template_set import Templates
from selfteach.prompts.thinking import Thinking
from selfteach.protocols import Environment
from selfteach.rollout.episode_engine import EpisodeEngine
from selfteach.runtime.deadline_calls import CallFailure, call_all
from selfteach.runtime.seeds import EpisodeKey, episode_seed
from selfteach.tasks.task import Task, load_task
from selfteach.trainer.build_environment import Environments, build_environments
from selfteach.types import Problem, Rollout, Sampling

SAMPLING = Sampling(1, 1.0, 200, 3)


@pytest.fixture(scope="module", params=["shape", "library"])
def folder(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """A folder with environments, for a library of the shape of `verifiers` and for itself."""
    folder = tmp_path_factory.mktemp("turns")
    (folder / "turns_env.py").write_text(EPISODES)
    (folder / "classic.py").write_text(CLASSIC)
    if request.param == "shape":
        with shaped_library(folder):
            yield folder
        return
    if importlib.util.find_spec("verifiers") is None:
        pytest.skip("verifiers is not installed")
    yield folder


def recipe(folder: Path, name: str = "guess", **changes: Any) -> Recipe:
    place = name if ":" in name else f"turns_env.py:{name}"
    values = {
        "data": {"type": "verifiers", "environment": f"{folder}/{place}"},
        "environment": {"type": "verifiers", "deadline_s": 5.0, "max_turns": 6},
        "model": {"path": "tiny"},
        "objective": {"type": "grpo"},
    }
    return validate(Recipe, {**values, **changes}, where="test")


def loaded(made: Recipe) -> tuple[Task, Environments]:
    task = load_task(made.data, "", reward=made.reward, episodes=made.runs_hub_episodes)
    environments = build_environments(made, task)
    assert environments is not None
    return task, environments


def run(
    folder: Path, name: str, *turns: Sequence[str], **changes: Any
) -> tuple[list[Rollout], ScriptedTurns]:
    """Run an episode with each list of turns, all of one problem side by side."""
    task, environments = loaded(recipe(folder, name, **changes))
    renderer = Renderer(
        with_tools("qwen3"), Templates("turns_bare"), tools=environments.tools,
        thinking=Thinking(student=False),
    )  # fmt: skip
    problem = task.train[0]
    engine = ScriptedTurns(renderer, {(problem.id, i): texts for i, texts in enumerate(turns)})
    episodes = EpisodeEngine(engine, renderer, environments.make, environments.limits)
    return episodes.generate([problem], replace(SAMPLING, samples=len(turns))), engine


def events(rollout: Rollout) -> list[str]:
    return [segment.event or "turn" for segment in rollout.segments]


def test_an_episode_goes_as_in_the_library(folder: Path) -> None:
    problem = loaded(recipe(folder))[0].train[0]
    wanted = str(episode_seed(problem, EpisodeKey(SAMPLING.seed, 0, 0)) % 10)
    wrong = next(n for n in "01" if n != wanted)
    (rollout,), engine = run(folder, "guess", [wrong, wanted])
    assert events(rollout) == ["turn", "observation", "turn", "observation"]
    assert [segment.text for segment in rollout.segments] == [
        wrong,
        f"Not {wrong}.",
        wanted,
        "Yes.",
    ]
    assert rollout.observation == "The number has 1 digit."
    prompt = with_tools("qwen3").decode(engine.requests[0][0].prompt_ids)
    assert "Be brief." in prompt
    assert f"{rollout.problem.question}\n\nThe number has 1 digit.<|im_end|>" in prompt
    assert rollout.verdict is not None and rollout.verdict.rewards is not None
    assert rollout.verdict.correct and dict(rollout.verdict.rewards.values) == {
        "right": 1,
        "turns": 2,
    }
    assert rollout.verdict.rewards.total == 1.0 and rollout.finished


def test_stop_conditions_end_an_episode(folder: Path) -> None:
    (rollout,), _ = run(folder, "guess", ["x", "x", "x"])
    assert events(rollout) == ["turn", "observation", "turn", "observation", "turn"]
    assert rollout.finished and rollout.verdict is not None
    assert not rollout.verdict.correct and rollout.verdict.feedback == "Not x."
    short = {"environment": {"type": "verifiers", "max_turns": 1}}
    (cut,), _ = run(folder, "guess", ["x"], **short)
    assert events(cut) == ["turn", "observation", "budget"] and cut.verdict is not None
    assert cut.verdict.rewards is not None and dict(cut.verdict.rewards.values)["turns"] == 1


def test_each_failure_is_an_event_of_its_episode(folder: Path) -> None:
    began = time.monotonic()
    turns = [["hang"], ["fail"], ["nothing"], ["x", "x", "x"]]
    short = {"environment": {"type": "verifiers", "deadline_s": 1.0}}
    rollouts, _ = run(folder, "guess", *turns, **short)
    assert time.monotonic() - began < 30
    assert [events(r)[-1] for r in rollouts] == ["timeout", "failed", "failed", "turn"]
    details = [rollout.segments[-1].text for rollout in rollouts]
    assert "ValueError: no guess" in details[1] and "env_response returned no message" in details[2]
    for rollout in rollouts[:3]:
        assert rollout.verdict is not None and rollout.verdict.reward is None, "no advantage"
    assert rollouts[3].verdict is not None and rollouts[3].verdict.reward == 0.0


def test_code_that_blocks_the_loop_costs_one_batch_at_most(folder: Path) -> None:
    task, environments = loaded(
        recipe(folder, environment={"type": "verifiers", "deadline_s": 0.4})
    )
    first, second = environments.make(), environments.make()
    problem = task.train[0]
    assert first.reset(problem, 3) == "The number has 1 digit."
    (failure,) = call_all([lambda: first.step(Turn("block"))], deadline_s=0.4, threads=1)
    assert isinstance(failure, CallFailure) and failure.kind == "timeout"
    assert second.reset(problem, 3) == "The number has 1 digit."
    assert second.step(Turn("x")).texts == ("Not x.",), "on a loop that runs"


CALL = '<tool_call>\n{"name": "add", "arguments": {"x": %d, "y": 2}}\n</tool_call>'


def test_tools_are_offered_called_and_rewarded(folder: Path) -> None:
    made = [CALL % 1 + "\n" + CALL % 2, CALL % -1, "It is 3."]
    (rollout,), engine = run(folder, "sums", made)
    prompt = with_tools("qwen3").decode(engine.requests[0][0].prompt_ids)
    assert '"name": "add"' in prompt and "Add two numbers." in prompt
    assert events(rollout) == ["turn", "tool_result", "turn", "tool_error", "turn"]
    assert [s.text for s in rollout.segments if s.event] == ["3\n4", "x is negative"]
    assert rollout.verdict is not None and rollout.verdict.reward == 3.0
    unknown = CALL.replace("add", "divide") % 1
    (rollout,), _ = run(folder, "sums", [unknown, "It is 3."])
    assert events(rollout) == ["turn", "tool_error", "turn"], "there is no such tool"
    malformed = '```json\n{"name": "add", "arguments": {"x": 1, "y": 2}}\n```'
    (rollout,), _ = run(folder, "sums", [malformed, "It is 3."])
    assert events(rollout) == ["turn", "malformed_call", "turn"]
    (rollout,), _ = run(folder, "sums", [malformed] * 4)
    assert events(rollout)[-1] == "malformed_call" and rollout.finished, "its own limit of turns"


def test_a_tool_that_hangs_holds_nobody_up(folder: Path) -> None:
    ask = '<tool_call>\n{"name": "ask", "arguments": {"x": 1}}\n</tool_call>'
    turns = [[CALL % 99], [CALL % 1, ask, "3"]]
    short = {"environment": {"type": "verifiers", "deadline_s": 1.0}}
    rollouts, _ = run(folder, "sums", *turns, **short)
    assert [events(r)[-1] for r in rollouts] == ["timeout", "turn"]
    assert "in the loop: True" in rollouts[1].text


def test_an_episode_has_its_seed_and_is_cleaned_up(folder: Path) -> None:
    task, environments = loaded(recipe(folder))
    environment = environments.make()
    assert isinstance(environment, Environment)
    assert task.templates == "bare" and recipe(folder).model.templates == "turns_bare"
    close = environment.close  # type: ignore[attr-defined]
    environment.reset(task.train[0], 14)
    reply = EnvironmentReply(("Yes.",), "observation", done=True)
    assert environment.step(Turn("4")) == reply
    kind = type(task.environment.loads[0].environment)  # type: ignore[union-attr]
    kind.cleaned.clear()
    close()
    close()
    assert len(kind.cleaned) == 1, "an episode without a verdict is cleaned up, once"
    with pytest.raises(SelfteachError, match="is not of the environment"):
        environments.make().reset(Problem("other", "q", "a"), 1)


def test_a_reward_that_raises_counts_as_zero(folder: Path) -> None:
    (rollout,), _ = run(folder, "with_raising", ["x", "x", "x"])
    assert rollout.verdict is not None and rollout.verdict.rewards is not None
    assert rollout.verdict.rewards.failures == {"raising": "raised: KeyError: 'no'"}
    assert rollout.verdict.reward == 0.0


def test_what_rewrites_its_prompt_ends_the_run_before_it_samples(folder: Path) -> None:
    with pytest.raises(EngineError, match=r"none of the 1 .* setup_state rewrites the prompt"):
        run(folder, "rewriting", ["x"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("with_group", "its reward of_group compares the rollouts of a group"),
        ("branching", "Branching has a get_prompt_messages of its own"),
        ("classic.py:nothing", "is a int, neither an environment"),
    ],
)
def test_what_cannot_run_as_episodes_is_one_line(folder: Path, name: str, message: str) -> None:
    with pytest.raises(SelfteachError, match=message) as caught:
        loaded(recipe(folder, name))
    assert "\n" not in str(caught.value)


def test_several_turns_need_the_section(folder: Path) -> None:
    made = recipe(folder, environment=None, data={
        "type": "verifiers", "environment": f"{folder}/turns_env.py:guess", "verifier": "exact",
    })  # fmt: skip
    with pytest.raises(SelfteachError, match=r'set \[environment\] type = "verifiers"'):
        load_task(made.data, "", reward=made.reward)


def test_a_taskset_has_no_episodes(tmp_path: Path) -> None:
    pytest.importorskip("verifiers.v1")
    (tmp_path / "tasks.py").write_text(TASKSET)
    with pytest.raises(
        SelfteachError, match=r"is a taskset of verifiers.v1.*remove \[environment\]"
    ):
        loaded(recipe(tmp_path, "tasks.py:Sums"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"type": "chain_sums"}}, 'data.type is "chain_sums"'),
        (
            {"reward": {"functions": ["environment"], "success": 1.0}},
            "rewards each episode with its rubric already",
        ),
    ],
)
def test_sections_that_do_not_fit_are_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe(tmp_path, **changes)
