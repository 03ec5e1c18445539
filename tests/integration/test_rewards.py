"""Rewards of TRL's signature go through training, evaluation and resumes."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from scripted_server import says, serving

import selfteach
from selfteach import api, cli
from selfteach.config.recipe import Recipe
from selfteach.config.recipe_file import load_study
from selfteach.config.recipe_toml import recipe_toml
from selfteach.config.schema import validate
from selfteach.errors import CheckpointError, DataError, PartError
from selfteach.tasks.lab import lab_task
from selfteach.tasks.lab.world import World
from selfteach.tasks.lab.worlds import WORLDS
from selfteach.trainer.loop import run_to_end

REWARDS = """
import asyncio, json, pathlib, random, threading

CALLS = pathlib.Path(__file__).with_name("calls.jsonl")

def note(name, **values):
    with CALLS.open("a") as file:
        file.write(json.dumps({"name": name, **values}) + "\\n")

def length(completions, completion_ids, difficulty, **kwargs):
    state = kwargs["trainer_state"]
    kwargs["log_metric"]("longest", max(map(len, completion_ids)))
    kwargs["log_extra"]("words", [len(text.split()) for text in completions])
    note("length", step=state.global_step, of=state.max_steps, prompt=kwargs["prompts"][0],
         difficulty=difficulty, columns=sorted(kwargs))
    return [sum(ids) % 7 / 10 for ids in completion_ids]

async def noise(prompts, completions, completion_ids, **kwargs):
    await asyncio.sleep(0)
    note("noise", n=len(prompts))
    return [random.random() for _ in prompts]

def sometimes(completions, difficulty, bonus=1.0, **kwargs):
    return [bonus if d % 2 else None for d in difficulty]

def main(completions, **kwargs):
    thread = threading.current_thread() is threading.main_thread()
    note("main", main=thread)
    return [0.0] * len(completions)

def broken(completions, **kwargs):
    raise RuntimeError("no credit")

def nan(completions, **kwargs):
    return [float("nan")] * len(completions)
"""


def rows(count: int, seed: str) -> list[dict[str, Any]]:
    problems = lab_task.problems(World(WORLDS["two_styles"]), seed, count)
    return [
        {"id": p.id, "prompt": p.question, "answer": p.answer, "difficulty": i, **p.meta}
        for i, p in enumerate(problems)
    ]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "rewards.py").write_text(REWARDS)
    for name, count in (("train", 8), ("validation", 2)):
        lines = [json.dumps(row) for row in rows(count, name)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


def recipe(folder: Path, functions: list[Any], **changes: Any) -> Recipe:
    named = [
        {**f, "type": f"{folder}/{f['type']}"} if f["type"].startswith("rewards.py") else f
        for f in functions
    ]
    success = changes.pop("success", None)
    values: dict[str, Any] = {
        "model": {"path": "lab:two_styles"},
        "data": {
            "type": "files", "verifier": "lab", "world": "two_styles",
            "train": str(folder / "train.jsonl"), "validation": str(folder / "validation.jsonl"),
        },
        "sampling": {"max_tokens": 24, "batch_size": 8},
        "objective": {"type": "grpo"},
        "reward": {"functions": named, **({} if success is None else {"success": success})},
        "train": {"steps": 2, "problems_per_step": 4, "group_size": 4, "checkpoint_every": 1},
        "evaluation": {"every": 2, "validation_k": 2, "test": False},
    }  # fmt: skip
    return validate(Recipe, {**values, **changes})


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def calls(folder: Path, name: str) -> list[Mapping[str, Any]]:
    path = folder / "calls.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [row for line in lines if (row := json.loads(line))["name"] == name]


LENGTH = {"type": "rewards.py:length", "weight": 2.0}
NOISE = {"type": "rewards.py:noise", "weight": 0.5, "name": "dice"}


def test_weighted_rewards_reach_metrics_samples_and_advantages(folder: Path) -> None:
    run = folder / "run"
    run_to_end(recipe(folder, [LENGTH, NOISE, {"type": "verifier"}]), run)
    steps = [row for row in metrics(run) if row["kind"] == "step"]
    samples = [
        json.loads(x) for x in (run / "samples" / "step_000001.jsonl").read_text().splitlines()
    ]
    for sample in samples:
        parts = sample["rewards"]
        assert list(parts) == ["length", "dice", "verifier"]
        assert parts["verifier"] == float(sample["correct"])
        assert math.isclose(
            sample["reward"], 2 * parts["length"] + 0.5 * parts["dice"] + parts["verifier"]
        )
    totals = [sample["reward"] for sample in samples]
    assert math.isclose(steps[0]["reward"], sum(totals) / len(totals))
    lengths = [sample["rewards"]["length"] for sample in samples]
    mean = sum(lengths) / len(lengths)
    assert math.isclose(steps[0]["rewards/length/mean"], mean)
    std = math.sqrt(sum((x - mean) ** 2 for x in lengths) / (len(lengths) - 1))
    assert math.isclose(steps[0]["rewards/length/std"], std)
    assert steps[0]["log_metric/longest"] > 0
    first = calls(folder, "length")[0]
    assert (first["step"], first["of"]) == (0, 2) and calls(folder, "length")[-1]["step"] == 1
    assert first["prompt"] == rows(8, "train")[first["difficulty"][0]]["prompt"]
    assert {"answer", "id", "log_extra", "log_metric", "prompts"} <= {*first["columns"]}
    assert "prompt" not in first["columns"]
    stored = (run / "rewards" / "step_000001.000.length.jsonl").read_text().splitlines()
    assert json.loads(stored[0])["extra"] == {"words": json.loads(stored[0])["extra"]["words"]}


def test_a_resume_uses_the_stored_rewards_bit_for_bit(folder: Path) -> None:
    whole, killed = folder / "whole", folder / "killed"
    made = recipe(folder, [LENGTH, NOISE])
    run_to_end(made, whole)
    before = len(calls(folder, "noise"))
    shutil.copytree(
        whole, killed
    )  # as if killed before the first checkpoint, with all rewards there
    shutil.rmtree(killed / "checkpoints")
    (killed / "result.json").unlink()
    retained = [row for row in metrics(whole) if row["step"] < 1]
    (killed / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in retained))
    run_to_end(made, killed)
    assert len(calls(folder, "noise")) == before
    strip = [
        [
            {k: v for k, v in row.items() if not k.startswith(("time/", "active_", "waiting"))}
            for row in metrics(r)
        ]
        for r in (whole, killed)
    ]
    assert strip[0] == strip[1]
    weights = [(r / "model" / "model.safetensors").read_bytes() for r in (whole, killed)]
    assert weights[0] == weights[1]


def test_what_one_function_returned_is_kept_when_another_raises(folder: Path) -> None:
    made = recipe(folder, [NOISE, {"type": "rewards.py:broken"}, LENGTH])
    with pytest.raises(
        PartError, match=r"reward .*rewards.py:broken: .*RuntimeError: no credit \(rewards.py:"
    ):
        run_to_end(made, folder / "run")
    assert not calls(folder, "noise")  # functions that are awaited start after the others
    made = recipe(folder, [LENGTH, {"type": "rewards.py:broken"}])
    with pytest.raises(PartError):
        run_to_end(made, folder / "second")
    with pytest.raises(PartError):
        run_to_end(made, folder / "second")
    assert len([c for c in calls(folder, "length") if c["step"] == 0]) == 1


def test_success_is_a_threshold_of_the_total(folder: Path) -> None:
    run = folder / "run"
    run_to_end(recipe(folder, [LENGTH], success=0.6), run)
    for path in sorted((run / "samples").iterdir()):
        for sample in map(json.loads, path.read_text().splitlines()):
            assert sample["correct"] == (sample["reward"] >= 0.6)
    evaluation = json.loads((run / "evaluations" / "validation_000002.json").read_text())
    assert evaluation["correct"] == [[r >= 0.6 for r in row] for row in evaluation["rewards"]]
    row = next(row for row in metrics(run) if row["kind"] == "validation" and row["step"] == 2)
    flat = [r for row in evaluation["rewards"] for r in row]
    assert math.isclose(row["reward"], sum(flat) / len(flat))
    assert row["avg"] == 100 * sum(r >= 0.6 for r in flat) / len(flat)


def test_a_rollout_to_which_no_reward_applies_has_no_part_in_the_loss(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = folder / "run"
    made = recipe(folder, [{"type": "rewards.py:sometimes", "options": {"bonus": 0.5}}])
    run_to_end(made, run)
    rewards = [
        sample["reward"]
        for path in (run / "samples").iterdir()
        for sample in map(json.loads, path.read_text().splitlines())
    ]
    assert {*rewards} == {None, 0.5}
    step = metrics(run)[1]
    assert 0 < step["unscored"] < 1 and step["reward"] == 0.5 and step["optimizer_steps"] == 0
    assert "no reward applies to sample" in caplog.text


def test_a_reward_that_is_not_finite_is_refused_in_one_line(folder: Path) -> None:
    with pytest.raises(
        PartError, match=r"returned 'nan' for sample 0 of problem .*finite number, or None"
    ):
        run_to_end(recipe(folder, [{"type": "rewards.py:nan"}]), folder / "run")


def test_a_changed_column_is_another_problem(folder: Path) -> None:
    made = recipe(folder, [LENGTH])
    run_to_end(made, folder / "run")
    (folder / "run" / "result.json").unlink()
    path = folder / "train.jsonl"
    path.write_text(path.read_text().replace('"difficulty": 3', '"difficulty": 30'))
    with pytest.raises(CheckpointError, match="the train problems are not those"):
        run_to_end(made, folder / "run")


def test_judges_are_paid_once_and_counted(folder: Path) -> None:
    """A resumed run and one that is begun anew in another folder both use what was bought."""
    with serving(says(lambda body: f"Score: {len(body['messages'][-1]['content']) % 8}")) as server:
        judge = {
            "type": "judge", "base_url": server.url, "model": "m", "weight": 0.1, "price_prompt": 1.0,
            "reply_cache": str(folder / "replies.sqlite"),
        }  # fmt: skip
        made = recipe(folder, [judge, {"type": "verifier"}], success=0.5)
        run_to_end(made, folder / "run")
        sent = len(server.requests)
        rows = metrics(folder / "run")
        assert sum(row.get("judge_requests", 0) for row in rows) == sent > 0
        budget = json.loads((folder / "run" / "result.json").read_text())["budget"]
        assert budget["judge_requests"] == sent
        assert math.isclose(budget["judge_cost"], sent * 20 / 1e6)
        assert any(row["kind"] == "validation" and row["judge_requests"] for row in rows)
        (folder / "run" / "result.json").unlink()
        shutil.rmtree(folder / "run" / "checkpoints")
        (folder / "run" / "metrics.jsonl").unlink()
        run_to_end(made, folder / "run")
        again = json.loads((folder / "run" / "result.json").read_text())["budget"]
        assert again["judge_requests"] == sent == len(server.requests)
        shutil.rmtree(folder / "run" / "rewards")  # a kill before the rewards were stored
        (folder / "run" / "result.json").unlink()
        shutil.rmtree(folder / "run" / "checkpoints")
        (folder / "run" / "metrics.jsonl").unlink()
        (folder / "run" / "checksums.jsonl").unlink()
        run_to_end(made, folder / "run")
        again = json.loads((folder / "run" / "result.json").read_text())["budget"]
        assert again["judge_requests"] == sent == len(server.requests)
        run_to_end(made, folder / "other")
        other = json.loads((folder / "other" / "result.json").read_text())["budget"]
        assert other["judge_requests"] == 0 and other["judge_cached"] > 0
        assert sent == len(server.requests)


def test_a_judge_that_fails_leaves_the_rollout_without_its_reward(folder: Path) -> None:
    with serving(says("no idea")) as server:
        judge = {
            "type": "judge", "base_url": server.url, "model": "m", "max_attempts": 1, "name": "taste",
            "reply_cache": str(folder / "replies.sqlite"),
        }  # fmt: skip
        run_to_end(recipe(folder, [judge, {"type": "verifier"}]), folder / "run")
    step = metrics(folder / "run")[1]
    assert step["judge_failure/taste/malformed"] == 1 and "rewards/taste/mean" not in step
    assert math.isclose(step["reward"], step["rewards/verifier/mean"])
    path = folder / "run" / "samples" / "step_000001.jsonl"
    sample = json.loads(path.read_text().splitlines()[0])
    assert sample["rewards"]["taste"] is None and "malformed" in sample["reward_failures"]["taste"]


def test_functions_from_python_and_their_sources(folder: Path) -> None:
    def short(completion_ids: Any, **kwargs: Any) -> list[float]:
        return [-len(ids) / 100 for ids in completion_ids]

    def flat(completions: Any, **kwargs: Any) -> list[float]:
        return [0.5 for _ in completions]

    plain = recipe(folder, [{"type": "verifier"}])
    result = selfteach.train(plain, folder / "run", components={"reward": [short, flat]})
    assert result["step"] == 2
    step = metrics(folder / "run")[1]
    assert step["rewards/flat/mean"] == 0.5 and step["rewards/short/mean"] < 0
    stored = json.loads((folder / "run" / "parts.json").read_text())["parts"]
    assert [*stored] == ["reward.functions.0", "reward.functions.1"]
    with pytest.raises(PartError, match="two are named"):
        selfteach.train(plain, folder / "b", components={"reward": [lambda **_: 1, lambda **_: 2]})


def test_a_step_from_python_has_the_rewards_and_an_evaluation_pays_for_none(folder: Path) -> None:
    built = api.build(recipe(folder, [LENGTH]))
    samples, _ = api.train_step(built.components, built.task.train[:2])
    rewards = [sample.critiqued.verdict.reward for sample in samples]
    lengths = [sum(sample.rollout.token_ids) % 7 / 10 for sample in samples]
    assert rewards == [LENGTH["weight"] * length for length in lengths]
    assert built.for_measuring().components.reward is None
    decided = api.build(recipe(folder, [LENGTH], success=0.6))
    assert decided.for_measuring().components.reward is decided.components.reward is not None


def test_a_changed_function_is_refused_by_a_resume(folder: Path) -> None:
    made = recipe(folder, [LENGTH])
    run_to_end(made, folder / "run")
    (folder / "run" / "result.json").unlink()
    (folder / "rewards.py").write_text(REWARDS + "# changed\n")
    with pytest.raises(CheckpointError, match=r"reward.functions.0 rewards.py:length has changed"):
        run_to_end(made, folder / "run")
    again = load_study(folder / "run" / "recipe.toml").recipe("recipe", seed=0)
    assert again.reward is not None
    assert again.reward.functions[0].type.endswith("run/parts/reward.functions.0/rewards.py:length")


def test_evaluate_uses_the_threshold(folder: Path) -> None:
    run = folder / "run"
    run_to_end(recipe(folder, [LENGTH], success=0.6), run)
    measured = api.evaluate(run, problems="validation", k=2)
    flat = [r for row in measured["evaluation"]["rewards"] for r in row]
    assert measured["avg"]["mean"] == 100 * sum(r >= 0.6 for r in flat) / len(flat)


def test_prompts_without_answers_are_enough_where_no_verifier_decides(folder: Path) -> None:
    for name in ("train", "validation"):
        lines = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        retained = [{key: row[key] for key in ("prompt", "difficulty", "id")} for row in lines]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in retained))
    data = {
        "type": "files", "train": str(folder / "train.jsonl"), "verifier": "exact",
        "validation": str(folder / "validation.jsonl"),
    }  # fmt: skip
    run_to_end(recipe(folder, [LENGTH], success=0.6, data=data), folder / "run")
    flat = [
        r
        for row in json.loads(
            (folder / "run" / "evaluations" / "validation_000002.json").read_text()
        )["rewards"]
        for r in row
    ]
    row = metrics(folder / "run")[-1]
    assert row["kind"] == "validation" and row["avg"] == 100 * sum(r >= 0.6 for r in flat) / len(
        flat
    )
    with pytest.raises(DataError, match="no column 'answer'"):
        run_to_end(recipe(folder, [LENGTH], data=data), folder / "second")


def test_selected_problems_keep_the_columns_that_rewards_need(folder: Path) -> None:
    made = recipe(folder, [LENGTH], success=0.6)
    values = {
        k: v for k, v in made.model_dump(mode="json").items() if v is not None and k != "seed"
    }
    (folder / "recipe.toml").write_text(recipe_toml({"seed": 0, **values}))
    settings = (
        "\n[select]\nsamples = 2\nmax_solve_rate = 1.0\nmin_format_rate = 0.0\ncritic = false\n"
    )
    with (folder / "recipe.toml").open("a") as file:
        file.write(settings + 'pool = ["train"]\nsplit = { validation = 1, test = 1 }\n')
    words = ["select", str(folder / "recipe.toml"), "--out", str(folder / "selected")]
    cli.app(words, standalone_mode=False)
    out = [json.loads(x) for x in (folder / "selected" / "train.jsonl").read_text().splitlines()]
    originals = {row["id"]: row for row in rows(8, "train")}
    assert out and all(row["difficulty"] == originals[row["id"]]["difficulty"] for row in out)
    assert (folder / "selected" / "rewards").is_dir()
    before = len(calls(folder, "length"))
    for row in out:
        assert 0 <= row["meta"]["selection"]["avg"] <= 1
    cli.app(words, standalone_mode=False)
    assert len(calls(folder, "length")) == before


def test_functions_run_in_the_main_thread_also_with_a_served_critic(folder: Path) -> None:
    """Scorers that stop themselves by a signal can do so in the main thread alone."""
    with serving(says("no critique")) as server:
        critic = {
            "type": "endpoint", "base_url": server.url, "model": "m", "max_attempts": 1,
            "reply_cache": str(folder / "replies.sqlite"),
        }  # fmt: skip
        run_to_end(recipe(folder, [{"type": "rewards.py:main"}], critic=critic), folder / "run")
    assert len(calls(folder, "main")) == 4  # two steps of two batches
    assert all(call["main"] for call in calls(folder, "main"))


def test_a_run_in_another_order_of_time_has_the_same_rewards(folder: Path) -> None:
    """Sampling ahead with a critic changes which weights sample, not what functions are told."""
    critic = {"type": "oracle"}
    train = {
        "steps": 2,
        "problems_per_step": 2,
        "group_size": 4,
        "checkpoint_every": 1,
        "staleness": 1,
    }
    run_to_end(recipe(folder, [LENGTH], critic=critic, train=train), folder / "run")
    assert {c["step"] for c in calls(folder, "length")} == {0, 1}
