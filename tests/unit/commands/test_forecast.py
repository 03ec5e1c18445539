"""A forecast samples once, shares what arms have in common, and reports wrong input in one line."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from selfteach import api, cli
from selfteach.commands import actions
from selfteach.commands.forecast import collection
from selfteach.commands.forecast.collection import ForecastRequest
from selfteach.commands.forecast.run_forecast import forecast
from selfteach.commands.forecast.teacher_samples import TEACHER_STREAM, sample_teacher
from selfteach.config.recipe import Recipe
from selfteach.config.recipe_file import study_from
from selfteach.errors import CheckpointError, RecipeError
from selfteach.rollout.transformers_engine import PromptRequest, TransformersEngine
from selfteach.runtime.run_folder import RunFolder
from selfteach.types import Critique, CritiqueFailure, CritiqueStep, Problem, Rollout, Sampling

TABLES: dict[str, Any] = {
    "model": {"path": "lab:two_styles"},
    "data": {"type": "lab", "max_solve_rate": 0.01, "train": 8, "validation": 40, "test": 2},
    "sampling": {"max_tokens": 40, "batch_size": 64},
    "train": {"problems_per_step": 4, "group_size": 8, "steps": 70},
    "arms": {
        "grpo": {"objective": {"type": "grpo"}},
        "nothing": {"context": {"type": "none"}},
        "reference": {"context": {"type": "reference"}},
        "answer_only": {"critic": {"type": "oracle"}, "context": {"type": "answer_only"}},
        "step_aligned": {"critic": {"type": "oracle"}, "context": {"type": "step_aligned"}},
        "ema": {
            "critic": {"type": "oracle"},
            "context": {"type": "step_aligned"},
            "teacher": {"type": "ema"},
        },
    },
}
RECIPE = str(
    Path(__file__).parents[3] / "src" / "selfteach" / "recipes" / "paper_in_miniature.toml"
)
REQUEST = ForecastRequest(problems=12, k=2)


def recipes(tables: dict[str, Any] = TABLES) -> dict[str, Recipe]:
    study = study_from(tables)
    return {arm: study.recipe(arm, seed=0) for arm in study.arms}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("forecast") / "out"
    forecast(recipes(), REQUEST, out)
    return out


@pytest.fixture
def result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "forecast.json").read_text())


def mean(arm: dict[str, Any], measure: str) -> float | None:
    value = arm["measures"][measure]
    return None if value is None else value["mean"]


def test_the_verdicts_on_the_lab_are_those_of_its_experiments(result: dict[str, Any]) -> None:
    verdicts = {name: arm["verdict"] for name, arm in result["arms"].items()}
    assert verdicts["reference"] == verdicts["step_aligned"] == verdicts["ema"] == "can"
    assert verdicts["answer_only"] == verdicts["nothing"] == "cannot"
    assert "the last step and the final answer" in result["arms"]["answer_only"]["reasons"][0]
    assert "predicts what the student predicts" in result["arms"]["nothing"]["reasons"][0]
    assert list(result["arms"]) == list(TABLES["arms"])


def test_an_arm_of_grpo_has_its_groups_and_no_teacher(result: dict[str, Any]) -> None:
    grpo = result["arms"]["grpo"]
    assert mean(grpo, "mixed_groups") is not None and mean(grpo, "edge") is None
    assert grpo["teacher_sees"] is None and grpo["step"]["tokens_teacher"] == 0
    assert grpo["mixed_groups_from"] == "each problem's rate"


def test_the_null_control_has_no_divergence_and_a_context_of_nothing(
    result: dict[str, Any],
) -> None:
    nothing = result["arms"]["nothing"]
    assert mean(nothing, "divergence") == pytest.approx(0, abs=1e-6)
    assert mean(nothing, "shown") == 100 and nothing["teacher_sees"] == "none"


def test_arms_share_rollouts_critiques_and_what_the_teacher_is_shown(
    folder: Path, result: dict[str, Any]
) -> None:
    names = {path.name.split(".")[0] for path in (folder / "rollouts").glob("*.jsonl")}
    views = ("nothing", "reference", "answer_only", "step_aligned")  # not ema: as step_aligned
    assert names == {"base_0", *(f"teacher_{view}" for view in views)}
    assert len(list((folder / "critiques").iterdir())) == 1
    arms = result["arms"]
    assert arms["ema"]["measures"] == arms["step_aligned"]["measures"]
    assert len({mean(arm, "right") for arm in arms.values()}) == 1


def test_a_step_costs_its_rollouts_in_tokens_and_seconds(result: dict[str, Any]) -> None:
    step = result["arms"]["step_aligned"]["step"]
    assert step["rollouts"] == 32 and step["steps"] == 70
    assert 32 * 25 < step["tokens_sampled"] <= 32 * 40
    seconds = [step[f"seconds_{kind}"] for kind in ("sampling", "critique", "learning")]
    assert all(value > 0 for value in seconds) and step["seconds"] == pytest.approx(sum(seconds))


def refuse(*_args: object, **_options: object) -> None:
    raise AssertionError("a second call samples, critiques or trains nothing")


def test_a_second_call_samples_and_critiques_nothing(
    folder: Path, result: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TransformersEngine, "complete", refuse)
    monkeypatch.setattr(collection, "build_critic", refuse)
    monkeypatch.setattr(collection, "measure_training", refuse)
    monkeypatch.setattr(collection, "write_inspection", refuse)
    again = forecast(recipes(), REQUEST, folder)
    assert json.loads(json.dumps(again)) == result


def test_a_forecast_that_was_interrupted_samples_only_what_is_missing(
    folder: Path, result: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in (folder / "rollouts").glob("teacher_step_aligned.*.jsonl"):
        path.unlink()
    (folder / "inspection" / "base_0" / "inspection.json").unlink()
    requests: list[PromptRequest] = []
    complete = TransformersEngine.complete

    def counting(self: TransformersEngine, batch: Any, sampling: Sampling) -> list[Rollout]:
        requests.extend(batch)
        return complete(self, batch, sampling)

    monkeypatch.setattr(TransformersEngine, "complete", counting)
    again = forecast(recipes(), REQUEST, folder)
    assert sum(len(request.samples) for request in requests) == 24
    for arm, value in again["arms"].items():
        assert value["measures"] == result["arms"][arm]["measures"]


def test_a_folder_of_another_forecast_is_refused(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="holds another forecast"):
        forecast(recipes(), ForecastRequest(problems=13, k=2), folder)


class MostlyFailing:
    """Critiques one rollout in 24."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, judged: Sequence[tuple[Rollout, Any]]) -> list[Critique | CritiqueFailure]:
        self.calls += 1
        rollout = judged[0][0]
        first = Critique("D", (CritiqueStep(rollout.text, "fixed"),), rollout.problem.answer, 0)
        return [first, *[CritiqueFailure("malformed", "no steps")] * (len(judged) - 1)]


def test_arms_with_one_critic_share_its_critiques_and_its_failures_decide(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    critic = MostlyFailing()
    monkeypatch.setattr(collection, "build_critic", lambda *args, **options: critic)
    arms = {name: TABLES["arms"][name] for name in ("answer_only", "step_aligned")}
    result = forecast(recipes({**TABLES, "arms": arms}), REQUEST)["arms"]
    assert critic.calls == 1
    for arm in result.values():
        assert arm["critic_failures"] == arm["without_context"] == {"malformed": 23}
        assert mean(arm, "usable_critiques") == pytest.approx(100 / 24)
    assert "1 in 24 rollouts (mostly: the critic's reply is malformed)" in "; ".join(
        result["step_aligned"]["reasons"]
    )


def test_resume_names_the_command_that_continues_a_forecast(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="repeat its selfteach forecast command"):
        cli.app(["resume", str(folder)], standalone_mode=False)


def test_wrong_input_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="-k 1 is too few"):
        forecast(recipes(), ForecastRequest(k=1))
    (tmp_path / "file.txt").write_text("something")
    with pytest.raises(CheckpointError, match="is not empty"):
        forecast(recipes(), REQUEST, tmp_path)
    with pytest.raises(RecipeError, match="no arm 'setp_aligned'"):
        api.forecast_recipe(RECIPE, arms=["setp_aligned"])


def test_a_recipe_with_vllm_says_that_its_engine_was_not_used() -> None:
    served = {**TABLES, "engine": {"type": "vllm_server", "model": "m"}}
    served["arms"] = {"grpo": TABLES["arms"]["grpo"]}
    result = forecast(recipes(served), ForecastRequest(problems=2, k=2))
    assert "not with vLLM" in result["notes"][0]
    assert result["arms"]["grpo"]["step"]["seconds_sampling"] is None


def test_the_command_prints_a_row_and_a_verdict_per_arm(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["forecast", RECIPE, "-k", "2", "--problems", "6"]
    words += ["--arm", "grpo", "--arm", "step_aligned", "--out", str(tmp_path / "out")]
    cli.app(words, standalone_mode=False)
    printed = capsys.readouterr().out
    assert "6 validation problems, 2 rollouts each" in printed
    assert re.search(r"^ step_aligned .*\d", printed, re.M) and "grpo: undecided" in printed
    assert "step_aligned: can be expected to teach" in printed
    assert max(map(len, printed.splitlines()[:-1])) <= actions.PIPED_COLUMNS
    assert str(tmp_path / "out" / "forecast.json") in printed.replace("\n", "")


class ScriptedEngine:
    """Answers every prompt with its length, and records the batches."""

    def __init__(self) -> None:
        self.batches: list[list[PromptRequest]] = []
        self.seeds: set[int] = set()

    def complete(self, requests: Sequence[PromptRequest], sampling: Sampling) -> list[Rollout]:
        self.batches.append(list(requests))
        self.seeds.add(sampling.seed)
        return list(self._rollouts(requests))

    @staticmethod
    def _rollouts(requests: Sequence[PromptRequest]) -> Iterator[Rollout]:
        for request in requests:
            for sample in request.samples:
                text = str(len(request.prompt_ids))
                ids = request.prompt_ids
                yield Rollout(request.problem, sample, ids, (1,), (0.0,), text, True, 0)


def test_rollouts_with_the_same_prompt_share_its_prefill(tmp_path: Path) -> None:
    problems = [Problem("a", "?", "1"), Problem("b", "?", "1")]
    rollouts = [Rollout(p, s, (0,), (1,), (0.0,), "", True, 0) for p in problems for s in (0, 1)]
    prompts = {("a", 0): (1,), ("a", 1): (1,), ("b", 0): (1, 2), ("b", 1): (1, 2, 3)}
    engine = ScriptedEngine()
    sampling = Sampling(samples=2, temperature=1.0, max_tokens=4, seed=5)

    def sample() -> dict[tuple[str, int], list[Rollout]]:
        return sample_teacher(
            engine, RunFolder(tmp_path), "teacher_x", rollouts, prompts, sampling,  # type: ignore[arg-type]
            batch_size=4, progress=lambda done, total: None,
        )  # fmt: skip

    completions = sample()
    batches = [[(r.problem.id, r.samples) for r in batch] for batch in engine.batches]
    assert batches == [[("b", (0, 1)), ("b", (2, 3))], [("a", (0, 1, 2, 3))]]
    assert engine.seeds == {5 + TEACHER_STREAM}
    texts = {key: [r.text for r in replies] for key, replies in completions.items()}
    assert texts == {key: [str(len(prompt))] * 2 for key, prompt in prompts.items()}
    assert sample() == completions and len(engine.batches) == 2
