"""An environment of `verifiers` gives problems and rewards; tried with a library of its shape."""

from __future__ import annotations

import math
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from verifiers_environments import CLASSIC, TASKSET, shaped_library

from selfteach.config.recipe import Recipe
from selfteach.config.recipe_file import load_study
from selfteach.config.schema import validate
from selfteach.errors import SelfteachError
from selfteach.feedback.rewards.combined_reward import CombinedReward
from selfteach.tasks.task import Task, load_task
from selfteach.trainer.build_reward import build_reward
from selfteach.types import Rollout, Verdict

EXAMPLE = Path(__file__).parents[3] / "examples" / "parts" / "hub_environment.toml"
REWARD = {"functions": ["environment"], "success": 1.0}


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder with environments, on the path of imports, beside the library of the shape."""
    (tmp_path / "sums_env.py").write_text(CLASSIC)
    with shaped_library(tmp_path, "sums_env"):
        yield tmp_path


@pytest.fixture
def real(tmp_path: Path) -> Path:
    pytest.importorskip("verifiers.v1")
    (tmp_path / "classic.py").write_text(CLASSIC)
    (tmp_path / "tasks.py").write_text(TASKSET)
    return tmp_path


def recipe(environment: str, reward: Any = REWARD, **data: Any) -> Recipe:
    named = {"type": "verifiers", "environment": environment, **data}
    return validate(Recipe, {"data": named, "objective": {"type": "grpo"}, "reward": reward})


def loaded(environment: str, reward: Any = REWARD, **data: Any) -> Task:
    made = recipe(environment, reward, **data)
    return load_task(made.data, "lab:two_styles", reward=made.reward)


class Decoding:
    """Stands for a renderer: a rollout's token ids index its text."""

    def __init__(self, texts: list[str]) -> None:
        self.texts = texts

    def completion(self, ids: Any) -> str:
        return self.texts[ids[0]]


def rewarded(
    environment: str, texts: list[str], reward: Any = REWARD, **data: Any
) -> list[Verdict]:
    """Return the verdicts on these completions of the first training problem."""
    made = recipe(environment, reward, **data)
    task = load_task(made.data, "lab:two_styles", reward=made.reward)
    renderer: Any = Decoding(texts)
    combined = build_reward(made, task, renderer)
    assert isinstance(combined, CombinedReward) and combined.in_main_thread
    problem = task.train[0]
    rollouts = [Rollout(problem, i, (), (i,), (0.0,), t, i != 1, 0) for i, t in enumerate(texts)]
    return combined([(rollout, Verdict.of_final(False, None)) for rollout in rollouts])


def check_problems(task: Task) -> None:
    assert len(task.train) + len(task.validation) == 10 and len(task.test) == 2
    first = task.train[0]
    assert first.question.startswith("What is") and first.history == (("system", "Be brief."),)
    assert task.templates == "bare" and "environment row" not in first.columns
    assert {p.answer for p in task.test} == {"200", "202"}


def check_rewards(environment: str) -> None:
    """Problem 0 has the answer 0, level 0."""
    good, bad = rewarded(environment, ["it is 0!", "no"], split={"validation": 0, "test": 0})
    assert good.rewards is not None and bad.rewards is not None
    assert dict(good.rewards.values) == {"correct": 1, "longer": 8, "longest": 1, "picky": 1}
    assert dict(bad.rewards.values) == {"correct": 0, "longer": 2, "longest": 0, "picky": 0}
    assert bad.rewards.failures == {"picky": "raised: ValueError: no no"}
    assert good.correct and not bad.correct
    assert math.isclose(good.reward or 0, 1 + 0.08 + 0.5 + 0.25)
    assert math.isclose(bad.reward or 0, 0.02)


def test_rows_are_problems_and_the_evaluation_set_is_the_test(folder: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    check_problems(loaded("sums-env"))
    assert signal.getsignal(signal.SIGTERM) is before, "environments replace handlers"
    check_problems(loaded(f"{folder}/sums_env.py:load_environment"))
    alone = loaded("owner/sums-env@1.0", options={"evaluation": 0, "count": 6})
    assert sum(len(split) for split in (alone.train, alone.validation, alone.test)) == 6
    other = loaded("sums_env", options={"evaluation": 0}, test_options={"count": 40}, limit=5)
    assert len(other.train) + len(other.validation) == 0 and len(other.test) == 5


def test_functions_of_a_rubric_are_rewards_with_its_weights(folder: Path) -> None:
    check_rewards("sums_env")
    halved = {"functions": [{"type": "environment", "weight": 0.5}, "verifier"], "success": 1.0}
    (good,) = rewarded("sums_env", ["it is 0!"], halved, split={"validation": 0, "test": 0})
    assert good.rewards is not None and list(good.rewards.values)[-1] == "verifier"
    assert math.isclose(good.reward or 0, 0.5 * (1 + 0.08 + 0.5 + 0.25))


def test_the_example_is_one(folder: Path) -> None:
    study = load_study(EXAMPLE)
    made = study.recipe(next(iter(study.arms)), seed=0)
    task = load_task(made.data, made.model.path, reward=made.reward)
    assert (len(task.train), len(task.validation), len(task.test)) == (140, 20, 40)
    assert task.environment is not None
    assert task.environment.weights == {"right": 1.0, "short": 0.1}


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("sums_env:several_turns", {}, "a Turns has several turns, tools"),
        ("sums_env:edited", {}, r"Edits answers or edits messages \(render_completion\)"),
        ("sums_env:nothing", {}, "is a int, neither an environment nor a taskset"),
        ("sums_env", {"options": {"cuont": 3}}, "no option 'cuont'; did you mean 'count'"),
        ("sums_env", {"options": {"count": "x"}}, "option count = 'x'"),
        ("absent", {}, "environment absent: no module 'absent' is installed"),
        ("a/b/c", {}, "'a/b/c' is no environment"),
        ("sums_env", {"reward": None}, "nothing says which answers are right"),
        ("sums_env", {"reward": {"functions": ["environment"]}}, "nothing says which answers"),
    ],
)
def test_what_cannot_be_trained_on_is_one_line(
    folder: Path, name: str, data: dict[str, Any], message: str
) -> None:
    with pytest.raises(SelfteachError, match=message) as caught:
        loaded(name, data.pop("reward", REWARD), **data)
    assert "\n" not in str(caught.value)


def test_rewards_of_an_environment_need_one_and_names_of_their_own(folder: Path) -> None:
    with pytest.raises(
        SelfteachError, match=r'is that of data\.type = "verifiers"; data\.type is "lab"'
    ):
        validate(Recipe, {"objective": {"type": "grpo"}, "reward": REWARD})
    clash = {"functions": ["environment", {"type": "verifier", "name": "picky"}], "success": 1.0}
    with pytest.raises(SelfteachError, match="the environment has a reward 'picky' too"):
        rewarded("sums_env", ["x"], clash)


def test_a_missing_library_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda *_: None)
    (tmp_path / "e.py").write_text("def load_environment(): ...")
    for name in ("gsm8k", f"{tmp_path}/e.py:load_environment"):
        with pytest.raises(SelfteachError, match=r"no extra of selfteach: pip install verifiers"):
            loaded(name)


def test_the_library_itself_classic(real: Path) -> None:
    name = f"{real}/classic.py:load_environment"
    check_problems(loaded(name))
    check_rewards(name)
    with pytest.raises(SelfteachError, match="a Turns has several turns"):
        loaded(f"{real}/classic.py:several_turns")


def test_the_library_itself_tasksets(real: Path) -> None:
    name = f"{real}/tasks.py:Sums"
    task = loaded(name, test_options={"start": 100, "count": 2}, split={"validation": 2, "test": 0})
    check_problems(task)
    good, bad = rewarded(name, ["it is 0!", "no"], split={"validation": 0, "test": 0})
    assert good.rewards is not None and bad.rewards is not None
    assert dict(good.rewards.values) == {"correct": 1, "form": 0.75, "picky": 1}
    assert dict(bad.rewards.values) == {"correct": 0, "form": 0.25, "picky": None}
    assert good.reward == 2 + 0.75 + 1 and bad.reward == 0.25 and good.correct and not bad.correct
    for bad_name, message in {
        "NeedsRuntime": "its reward ran needs a runtime",
        "Endless": "data.limit",
    }.items():
        with pytest.raises(SelfteachError, match=message):
            loaded(f"{real}/tasks.py:{bad_name}")
    with pytest.raises(SelfteachError, match="option cuont: Extra inputs"):
        loaded(name, options={"cuont": 3})
