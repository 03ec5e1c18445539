"""Test problem sets, their order, errors of broken ones, and verifiers of tagged answers."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfteach.config.data_section import FilesData
from selfteach.errors import DataError
from selfteach.tasks import segmentation, verifiers
from selfteach.tasks.lab import lab_task
from selfteach.tasks.lab.world import World
from selfteach.tasks.sources.load import read_file
from selfteach.tasks.task import load_task, training_order
from selfteach.types import Problem


def test_jsonl_problems_keep_ids_and_references(tmp_path: Path) -> None:
    path = tmp_path / "sums.jsonl"
    path.write_text(
        '{"question": "1+1", "answer": 2, "reference": "two"}\n\n'
        '{"id": "x", "question": "2+2", "answer": "4"}\n'
    )
    first, second = read_file(path)
    assert (first.place, first.answer, first.references) == ("sums-1", "2", {"reference": "two"})
    assert (second.id, second.references) == ("x", {})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ("not json\n", ":1: not a JSON object"),
        ("[1]\n", ":1: not a JSON object"),
        ('{"question": "a", "answer": "b"}\n{"question": "a"}\n', ":2: no column 'answer'"),
        ('{"question": " ", "answer": "b"}\n', "question is empty"),
        (
            '{"id": 1, "question": "a", "answer": "b"}\n{"id": 1, "question": "c", "answer": "d"}\n',
            "same id",
        ),
    ],
)
def test_a_broken_problem_set_is_a_one_line_error(
    tmp_path: Path, content: str, message: str
) -> None:
    path = tmp_path / "broken.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        read_file(path)


def test_a_missing_problem_set_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such problem set"):
        read_file(tmp_path / "nowhere.jsonl")


@given(count=st.integers(1, 20), per_step=st.integers(1, 25), seed=st.integers(0, 3))
def test_training_order(count: int, per_step: int, seed: int) -> None:
    steps = list(islice(training_order(count, seed, per_step), 12))
    flat = [index for step in steps for index in step]
    for step in steps:
        assert len(step) == min(per_step, count) == len(set(step))
    epochs = [flat[at : at + count] for at in range(0, len(flat), count)]
    assert all(len(set(epoch)) == len(epoch) for epoch in epochs), "an epoch visits each once"
    assert steps == list(islice(training_order(count, seed, per_step), 12))


def test_runs_of_earlier_versions_keep_their_order() -> None:
    steps = list(islice(training_order(5, 0, 3, uneven=True), 6))
    # Written by commit 9bbec72.
    assert steps == [[0, 4, 3], [2, 1, 3], [4, 0, 3], [2, 1, 3], [4, 0, 1], [2, 3, 0]]


def test_another_seed_gives_another_order() -> None:
    assert next(training_order(100, 0, 50)) != next(training_order(100, 1, 50))


def test_lab_splits_are_disjoint_and_filtered_by_difficulty() -> None:
    world = World()
    sets = {
        split: {p.question for p in lab_task.problems(world, split, 400)}
        for split in ("train", "validation", "test")
    }
    assert not sets["train"] & sets["test"] and not sets["train"] & sets["validation"]
    assert not sets["validation"] & sets["test"]
    hard = lab_task.problems(world, "train", 100, max_solve_rate=0.01)
    assert all(world.author_solve_rate(p.question.split()) < 0.01 for p in hard)
    easy = lab_task.problems(world, "train", 100)
    assert any(world.author_solve_rate(p.question.split()) > 0.9 for p in easy)


@pytest.mark.parametrize(
    ("answer", "text", "correct", "parsed"),
    [
        ("12", "<step_1>…</step_1><answer> 12 </answer>", True, "12"),
        ("12", "<answer>13</answer>", False, "13"),
        ("12", "<answer>13</answer> no: <answer>12</answer>", True, "12"),
        ("12", "twelve", False, None),
        ("12", "<answer></answer>", False, None),
    ],
)
def test_exact(answer: str, text: str, correct: bool, parsed: str | None) -> None:
    verdict = verifiers.exact(Problem("p", "q", answer), text)
    assert (verdict.correct, verdict.formatted, verdict.parsed) == (
        correct,
        parsed is not None,
        parsed,
    )


def test_equal_answers_are_right_and_have_one_canonical_form() -> None:
    verify = verifiers.MathVerifier()
    problem = Problem("p", "q", r"\frac{1}{2}")
    same = [verify(problem, f"<answer>{text}</answer>") for text in ("0.5", r"\frac{2}{4}")]
    assert all(verdict.correct for verdict in same)
    assert same[0].parsed == same[1].parsed
    assert not verify(problem, "<answer>2</answer>").correct
    assert not verify(problem, "one half").formatted


def test_free_form_answers_are_split_as_the_recipe_says(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"question": "1 + 1?", "answer": "2"}\n')
    for name, splitter in segmentation.SPLITTERS.items():
        config = FilesData.model_validate(
            {"type": "files", "train": str(tmp_path / "p.jsonl"), "steps": name}
        )
        task = load_task(config, "")
        assert task.split_steps is splitter
        assert task.templates == ("steps" if name == "tags" else "free")
