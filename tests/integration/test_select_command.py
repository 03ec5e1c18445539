"""`selfteach select` filters, splits and writes a card; it can be resumed, and its set trained on."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
from command_line import exit_status
from forked import kill_when

from selfteach.commands.select import selection
from selfteach.config.data_section import ChainSumsData, FilesData, SelectConfig
from selfteach.config.recipe import Recipe
from selfteach.errors import CheckpointError, DataError, RecipeError
from selfteach.feedback.critics.oracle import OracleCritic
from selfteach.rollout.journaled_engine import BatchedEngine
from selfteach.tasks import chain_sums
from selfteach.tasks.task import load_task
from selfteach.trainer.build import Built, build
from selfteach.types import (
    CriticSolution,
    Critique,
    CritiqueFailure,
    Problem,
    Rollout,
    Sampling,
    Usage,
    Verdict,
)

RECIPE = """
[model]
path = "lab:two_styles"
[data]
type = "lab"
train = 16
validation = 3
test = 4
[sampling]
max_tokens = 40
batch_size = 16
[context]
type = "step_aligned"
[critic]
type = "oracle"
[select]
samples = 4
split = { train = 5, validation = 2, test = 3 }
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE)
    return path


def outputs(folder: Path) -> dict[str, str]:
    names = ("train.jsonl", "validation.jsonl", "test.jsonl", "card.json", "README.md")
    return {name: (folder / name).read_text() for name in names}


def test_a_selected_set_can_be_trained_on(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "out"
    assert exit_status(monkeypatch, "select", recipe, "--out", out) == 0
    assert "problems: 16 in" in capsys.readouterr().out
    card = json.loads((out / "card.json").read_text())
    assert card["in"] == 16 == card["kept"] + sum(card["filters"].values())
    assert card["out"] == {"train": 5, "validation": 2, "test": 3}
    assert (
        card["answers"]
        == 64
        == sum((out / p).read_text().count("\n") for p in (out / "rollouts").iterdir())
    )
    assert sum(card["by_right_answers"]) == 16
    rows = {
        n: [json.loads(x) for x in (out / f"{n}.jsonl").read_text().splitlines()]
        for n in card["out"]
    }
    for row in (row for split in rows.values() for row in split):
        assert row["meta"]["selection"]["avg"] < 5 / 16 and row["meta"]["selection"]["k"] == 4
    # A recipe with the section that the card prints.
    text = (out / "README.md").read_text()
    section = text.split("```toml\n")[1].split("```")[0]
    training = tmp_path / "training.toml"
    training.write_text(RECIPE.split("[data]")[0] + section + "[sampling]\nmax_tokens = 40\n"
                   '[critic]\ntype = "oracle"\n[context]\ntype = "step_aligned"\n'
                   "[train]\nsteps = 1\nproblems_per_step = 2\ngroup_size = 2\n"
                   "[evaluation]\ntest_k = 2\nvalidation_k = 2\n")  # fmt: skip
    monkeypatch.chdir(out)
    assert exit_status(monkeypatch, "check", training) == 0
    assert "5 train, 2 validation, 3 test" in capsys.readouterr().out
    assert exit_status(monkeypatch, "train", training, "--out", tmp_path / "run") == 0
    samples = (tmp_path / "run" / "samples" / "step_000001.jsonl").read_text().splitlines()
    assert json.loads(samples[0])["critique"]["steps"], "the lab's oracle has the references"
    read = {"type": "files", "train": "train.jsonl", "verifier": "lab", "world": "two_styles"}
    task = load_task(FilesData.model_validate(read), "")
    assert all(set(p.references) == {"reference", "aligned_reference"} for p in task.train)


def test_a_killed_selection_resumes_without_sampling_again(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"
    samples = out / "samples" / "step_000000.jsonl"
    kill_when(samples.exists, exit_status, monkeypatch, "select", recipe, "--out", out)
    assert not (out / "card.json").exists()
    on_disk = {p: p.stat().st_mtime_ns for p in out.glob("rollouts/*.jsonl")}
    assert exit_status(monkeypatch, "resume", out) == 0
    assert {p: p.stat().st_mtime_ns for p in on_disk} == on_disk
    assert exit_status(monkeypatch, "select", recipe, "--out", whole) == 0
    assert outputs(out) == outputs(whole)


# -- with scripted rollouts ----------------------------------------------------------------------


class ScriptedEngine:
    """Returns listed completions per problem; counts the problems it was given."""

    def __init__(self, completions: dict[str, Sequence[str]]) -> None:
        self.completions, self.problem_count = completions, 0

    def generate(self, problems: Sequence[Problem], sampling: Sampling) -> list[Rollout]:
        self.problem_count += len(problems)
        return [
            Rollout(p, i, (1,), (5,), (-0.5,), self.completions[p.id][i], True, 0)
            for p in problems
            for i in range(sampling.samples)
        ]

    def load_weights(self, named_weights: object, version: int) -> None: ...


class RecordingCritic:
    """Records which rollouts it was given, and fails on some problems."""

    def __init__(self, inner: OracleCritic, fails: set[str]) -> None:
        self.inner, self.fails, self.keys = inner, fails, []

    def __call__(
        self, judged: Sequence[tuple[Rollout, Verdict]]
    ) -> list[Critique | CritiqueFailure]:
        self.keys += [rollout.key for rollout, _ in judged]
        return [
            CritiqueFailure("wrong_answer") if rollout.problem.id in self.fails else critique
            for (rollout, _), critique in zip(judged, self.inner(judged), strict=True)
        ]


RECIPE_VALUES = {
    "model": {"path": "lab:two_styles"},
    "data": {"type": "lab", "train": 2, "validation": 1, "test": 1},
    "sampling": {"max_tokens": 40, "batch_size": 8},
    "critic": {"type": "oracle"},
    "context": {"type": "step_aligned"},
}
CHOSEN = SelectConfig.model_validate(
    {"samples": 4, "max_solve_rate": 0.5, "split": {"train": 1, "validation": 1, "test": 1}}
)


@pytest.fixture
def chain(monkeypatch: pytest.MonkeyPatch) -> tuple[Built, ScriptedEngine, RecordingCritic]:
    """Six chain sums: easy, badly formatted, unsolved by the critic, and three that are selected."""
    task = load_task(ChainSumsData(train=6, validation=1, test=1), "")
    right = {p.id: f"{p.references['aligned_reference']}" for p in task.train}
    wrong, garbled = "1 + 1 = 3\nAnswer: -1", "who knows"
    plans = ["RRWW", "WWGG", "WWWW", "RWWW", "WWWR", "GWWW"]
    completions = {
        p.id: [{"R": right[p.id], "W": wrong, "G": garbled}[c] for c in plan]
        for p, plan in zip(task.train, plans, strict=True)
    }
    engine = ScriptedEngine(completions)
    critic = RecordingCritic(
        OracleCritic(chain_sums.critique_rollout, error_rate=0.0, seed=0), {task.train[2].id}
    )
    lab = build(Recipe.model_validate(RECIPE_VALUES))
    components = dataclasses.replace(
        lab.components, engine=BatchedEngine(engine, 8), verify=task.verify, critic=critic
    )
    built = dataclasses.replace(lab, components=components, task=task)
    monkeypatch.setattr(selection, "build", lambda recipe: built)
    return built, engine, critic


def run(
    folder: Path, chosen: SelectConfig = CHOSEN, **values: object
) -> list[selection.SelectionProgress]:
    return list(
        selection.select(Recipe.model_validate({**RECIPE_VALUES, **values}), chosen, folder)
    )


def with_settings(**settings: object) -> SelectConfig:
    return SelectConfig.model_validate({**CHOSEN.model_dump(), **settings})


def test_each_filter_is_applied(chain: tuple, tmp_path: Path) -> None:
    built, engine, critic = chain
    progress = run(tmp_path / "out", with_settings(min_format_rate=0.75))
    assert [(p.done, p.total) for p in progress] == [(2, 6), (4, 6), (6, 6)]
    assert progress[-1].selected == 3
    card = selection.card_of(tmp_path / "out")
    assert card["filters"] == {"too easy": 1, "badly formatted": 1, "critic fails": 1}
    assert card["by_right_answers"] == [3, 2, 1, 0, 0]
    ids = [p.id for p in built.task.train]
    # Only the first incorrect rollout of problems that are hard and well formatted is critiqued.
    assert critic.keys == [(ids[2], 0), (ids[3], 1), (ids[4], 0), (ids[5], 0)]
    selected = [json.loads(line)["id"] for n in ("train", "validation", "test")
            for line in (tmp_path / "out" / f"{n}.jsonl").read_text().splitlines()]  # fmt: skip
    assert sorted(selected) == sorted(ids[3:])
    assert engine.problem_count == 6


def test_a_problem_is_critiqued_until_it_is_solved(chain: tuple, tmp_path: Path) -> None:
    built, _, critic = chain
    run(tmp_path / "two", with_settings(critic_answers=2))
    solved, unsolved = built.task.train[1].id, built.task.train[2].id
    critiqued = Counter(id_ for id_, _ in critic.keys)
    assert critiqued[solved] == 1, "one right critique suffices"
    assert critiqued[unsolved] == 2
    count = len(critic.keys)
    run(tmp_path / "none", with_settings(critic=False))
    assert len(critic.keys) == count
    assert selection.card_of(tmp_path / "none")["filters"]["critic fails"] == 0


class SolvingCritic(RecordingCritic):
    """Solves every question but those that fail, and counts them."""

    def solve(self, problems: Sequence[Problem]) -> list[CriticSolution]:
        self.solved = [*getattr(self, "solved", []), *(problem.id for problem in problems)]
        return [
            CriticSolution(
                None if p.id in self.fails else p.references["aligned_reference"], Usage(1)
            )
            for p in problems
        ]


def test_the_critics_own_solution_can_decide(
    chain: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built, _, critic = chain
    ids = [p.id for p in built.task.train]
    solver = SolvingCritic(critic.inner, {ids[3]})
    solving = dataclasses.replace(
        built, components=dataclasses.replace(built.components, critic=solver)
    )
    monkeypatch.setattr(selection, "build", lambda recipe: solving)
    run(tmp_path / "out", with_settings(critic_test="solution", min_format_rate=0.75))
    card = selection.card_of(tmp_path / "out")
    assert card["filters"] == {"too easy": 1, "badly formatted": 1, "critic fails": 1}
    assert solver.solved == ids[2:], "hard and well formatted ones alone"
    assert solver.keys == [], "no rollout is critiqued"
    assert card["usage"]["requests"] == 4
    text = (tmp_path / "out" / "README.md").read_text()
    assert "asked to solve each question" in text and "own solution is not correct" in text


def test_a_program_cannot_solve_a_question(chain: tuple, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"critic_test = \"solution\" needs a language model"):
        run(tmp_path / "out", with_settings(critic_test="solution"))
    assert chain[1].problem_count == 0, "raised before anything is sampled"


@pytest.mark.parametrize("used", [True, False])
def test_a_critic_that_is_not_used_is_not_built(
    chain: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, used: bool
) -> None:
    recipes: list[Recipe] = []
    monkeypatch.setattr(selection, "build", lambda recipe: (recipes.append(recipe), chain[0])[1])
    run(tmp_path / "out", with_settings(critic=used))
    (recipe,) = recipes
    assert (recipe.critic is not None) == used


def test_other_filters_reuse_rollouts_and_critiques(chain: tuple, tmp_path: Path) -> None:
    _, engine, critic = chain
    run(tmp_path / "out")
    keys = list(critic.keys)
    other = with_settings(max_solve_rate=0.25, split={"validation": 0, "test": 1})
    run(tmp_path / "out", other)
    assert engine.problem_count == 6 and critic.keys == keys
    assert selection.card_of(tmp_path / "out")["filters"]["too easy"] == 3
    before = outputs(tmp_path / "out")
    assert run(tmp_path / "out", other) == []
    assert outputs(tmp_path / "out") == before
    with pytest.raises(CheckpointError, match="holds another run"):
        run(tmp_path / "out", with_settings(samples=3))


def test_impossible_settings_are_one_line(chain: tuple, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"select\.critic = true needs a critic"):
        run(tmp_path / "a", critic=None, context={"type": "reference"})
    with pytest.raises(DataError, match="6 problems are too few"):
        run(tmp_path / "b", with_settings(split={"test": 4, "validation": 4}))
    assert chain[1].problem_count == 0, "raised before anything is sampled"
    with pytest.raises(DataError, match=r"too few.* rollouts and critiques are stored"):
        run(tmp_path / "b2", with_settings(split={"test": 3, "validation": 2}))
    with pytest.raises(DataError, match="no problem is left"):
        run(tmp_path / "c", with_settings(min_format_rate=1, max_solve_rate=0.1, critic_answers=1))
    assert not (tmp_path / "c" / "card.json").exists()


def test_settings_change_the_select_table(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert (
        exit_status(
            monkeypatch, "select", recipe, "--out", tmp_path / "x", "--set", "select.sampels=2"
        )
        == 2
    )
    assert "did you mean 'samples'?" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
