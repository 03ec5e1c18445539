"""`selfteach select`: filters, splits, card; stopped and taken up anywhere; read back as a data set."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from forked import kill_when

from selfteach import cli
from selfteach.commands.select import selection
from selfteach.config.data_section import ChainSumsData, FilesData, SelectConfig
from selfteach.config.recipe import Recipe
from selfteach.errors import CheckpointError, DataError, RecipeError
from selfteach.feedback.critics.oracle import OracleCritic
from selfteach.tasks import chain_sums
from selfteach.tasks.task import load_task
from selfteach.trainer.build import Built, build
from selfteach.types import Critique, CritiqueFailure, Problem, Rollout, Sampling, Verdict

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


def call(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["selfteach", *map(str, words)])
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def outputs(folder: Path) -> dict[str, str]:
    names = ("train.jsonl", "validation.jsonl", "test.jsonl", "card.json", "README.md")
    return {name: (folder / name).read_text() for name in names}


def test_from_recipe_to_a_set_that_can_be_trained_on(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "out"
    assert call(monkeypatch, "select", recipe, "--out", out) == 0
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
    # The section that the card prints, in a recipe of its own.
    text = (out / "README.md").read_text()
    section = text.split("```toml\n")[1].split("```")[0]
    own = tmp_path / "own.toml"
    own.write_text(RECIPE.split("[data]")[0] + section + "[sampling]\nmax_tokens = 40\n"
                   '[critic]\ntype = "oracle"\n[context]\ntype = "step_aligned"\n'
                   "[train]\nsteps = 1\nproblems_per_step = 2\ngroup_size = 2\n"
                   "[evaluation]\ntest_k = 2\nvalidation_k = 2\n")  # fmt: skip
    monkeypatch.chdir(out)
    assert call(monkeypatch, "check", own) == 0
    assert "5 train, 2 validation, 3 test" in capsys.readouterr().out
    assert call(monkeypatch, "train", own, "--out", tmp_path / "run") == 0
    samples = (tmp_path / "run" / "samples" / "step_000001.jsonl").read_text().splitlines()
    assert json.loads(samples[0])["critique"]["steps"], "the lab's oracle knows the problems"
    read = {"type": "files", "train": "train.jsonl", "verifier": "lab", "world": "two_styles"}
    task = load_task(FilesData.model_validate(read), "")
    assert all(set(p.references) == {"reference", "aligned_reference"} for p in task.train)


def test_killed_and_resumed_it_is_the_same_and_samples_nothing_twice(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"
    samples = out / "samples" / "step_000000.jsonl"
    kill_when(samples.exists, call, monkeypatch, "select", recipe, "--out", out)
    assert not (out / "card.json").exists()
    on_disk = {p: p.stat().st_mtime_ns for p in out.glob("rollouts/*.jsonl")}
    assert call(monkeypatch, "resume", out) == 0
    assert {p: p.stat().st_mtime_ns for p in on_disk} == on_disk
    assert call(monkeypatch, "select", recipe, "--out", whole) == 0
    assert outputs(out) == outputs(whole)


# -- with scripted answers ----------------------------------------------------------------------


class Scripted:
    """An engine whose answers to a problem are a list; counts what it is asked."""

    def __init__(self, answers: dict[str, Sequence[str]]) -> None:
        self.answers, self.asked = answers, 0

    def generate(self, problems: Sequence[Problem], sampling: Sampling) -> list[Rollout]:
        self.asked += len(problems)
        return [
            Rollout(p, i, (1,), (5,), (-0.5,), self.answers[p.id][i], True, 0)
            for p in problems
            for i in range(sampling.samples)
        ]

    def load_weights(self, named_weights: object, version: int) -> None: ...


class Remembering:
    """A critic that counts, and fails on some problems."""

    def __init__(self, inner: OracleCritic, fails: set[str]) -> None:
        self.inner, self.fails, self.asked = inner, fails, []

    def __call__(
        self, judged: Sequence[tuple[Rollout, Verdict]]
    ) -> list[Critique | CritiqueFailure]:
        self.asked += [rollout.key for rollout, _ in judged]
        return [
            CritiqueFailure("wrong_answer") if rollout.problem.id in self.fails else said
            for (rollout, _), said in zip(judged, self.inner(judged), strict=True)
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
def chain(monkeypatch: pytest.MonkeyPatch) -> tuple[Built, Scripted, Remembering]:
    """Six chain sums: easy, ill-formed, unsolvable for the critic, and three that are kept."""
    task = load_task(ChainSumsData(train=6, validation=1, test=1), "")
    right = {p.id: f"{p.references['aligned_reference']}" for p in task.train}
    wrong, garbled = "1 + 1 = 3\nAnswer: -1", "who knows"
    plans = ["RRWW", "WWGG", "WWWW", "RWWW", "WWWR", "GWWW"]
    answers = {
        p.id: [{"R": right[p.id], "W": wrong, "G": garbled}[c] for c in plan]
        for p, plan in zip(task.train, plans, strict=True)
    }
    engine = Scripted(answers)
    critic = Remembering(
        OracleCritic(chain_sums.criticise, error_rate=0.0, seed=0), {task.train[2].id}
    )
    own = build(Recipe.model_validate(RECIPE_VALUES))
    parts = dataclasses.replace(own.components, engine=engine, verify=task.verify, critic=critic)
    built = dataclasses.replace(own, parts=parts, task=task)
    monkeypatch.setattr(selection, "build", lambda recipe: built)
    return built, engine, critic


def run(folder: Path, chosen: SelectConfig = CHOSEN, **values: object) -> list[selection.Standing]:
    return list(
        selection.select(Recipe.model_validate({**RECIPE_VALUES, **values}), chosen, folder)
    )


def with_settings(**settings: object) -> SelectConfig:
    return SelectConfig.model_validate({**CHOSEN.model_dump(), **settings})


def test_the_filters_one_by_one(chain: tuple, tmp_path: Path) -> None:
    built, engine, critic = chain
    standings = run(tmp_path / "out", with_settings(min_format_rate=0.75))
    assert [(s.judged, s.total) for s in standings] == [(2, 6), (4, 6), (6, 6)]
    assert standings[-1].kept == 3
    card = selection.card_of(tmp_path / "out")
    assert card["filters"] == {"too easy": 1, "badly formatted": 1, "critic fails": 1}
    assert card["by_right_answers"] == [3, 2, 1, 0, 0]
    ids = [p.id for p in built.task.train]
    # Asked about the first wrong answer of problems that are hard and well-formatted, and no other.
    assert critic.asked == [(ids[2], 0), (ids[3], 1), (ids[4], 0), (ids[5], 0)]
    kept = [json.loads(line)["id"] for n in ("train", "validation", "test")
            for line in (tmp_path / "out" / f"{n}.jsonl").read_text().splitlines()]  # fmt: skip
    assert sorted(kept) == sorted(ids[3:])
    assert engine.asked == 6


def test_a_critic_may_be_asked_more_than_once_or_not_at_all(chain: tuple, tmp_path: Path) -> None:
    built, _, critic = chain
    run(tmp_path / "two", with_settings(critic_answers=2))
    first = built.task.train[1].id
    assert [key for key in critic.asked if key[0] == first] == [(first, 0), (first, 1)]
    asked = len(critic.asked)
    run(tmp_path / "none", with_settings(critic=False))
    assert len(critic.asked) == asked
    assert selection.card_of(tmp_path / "none")["filters"]["critic fails"] == 0


def test_other_filters_over_the_same_answers_sample_and_ask_nothing_again(
    chain: tuple, tmp_path: Path
) -> None:
    _, engine, critic = chain
    run(tmp_path / "out")
    asked = list(critic.asked)
    other = with_settings(max_solve_rate=0.25, split={"validation": 0, "test": 1})
    run(tmp_path / "out", other)
    assert engine.asked == 6 and critic.asked == asked
    assert selection.card_of(tmp_path / "out")["filters"]["too easy"] == 3
    before = outputs(tmp_path / "out")
    assert run(tmp_path / "out", other) == []
    assert outputs(tmp_path / "out") == before
    with pytest.raises(CheckpointError, match="holds another run"):
        run(tmp_path / "out", with_settings(samples=3))


def test_what_makes_no_sense_is_one_line(chain: tuple, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"select\.critic asks the recipe's critic"):
        run(tmp_path / "a", critic=None, context={"type": "reference"})
    with pytest.raises(DataError, match="6 problems are too few"):
        run(tmp_path / "b", with_settings(split={"test": 4, "validation": 4}))
    assert chain[1].asked == 0, "known before anything is sampled"
    with pytest.raises(DataError, match=r"too few.* answers are kept"):
        run(tmp_path / "b2", with_settings(split={"test": 3, "validation": 2}))
    with pytest.raises(DataError, match="no problem is left"):
        run(tmp_path / "c", with_settings(min_format_rate=1, max_solve_rate=0.1, critic_answers=1))
    assert not (tmp_path / "c" / "card.json").exists()


def test_settings_reach_select(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert (
        call(monkeypatch, "select", recipe, "--out", tmp_path / "x", "--set", "select.sampels=2")
        == 2
    )
    assert "did you mean 'samples'?" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
