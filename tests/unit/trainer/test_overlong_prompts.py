"""Test that prompts which leave no room for a rollout stop a run, or are dropped and counted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from selfteach.commands.check.describe_recipe import describe_study
from selfteach.config.recipe import Recipe
from selfteach.config.recipe_file import study_from
from selfteach.errors import DataError
from selfteach.runtime.run_folder import RunFolder
from selfteach.trainer.build import build
from selfteach.trainer.loop import run_to_end, train
from selfteach.trainer.open_model import named_problems

HI = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c d"}]
LONG = " ".join("abcdef" * 20)


def write_problems(folder: Path) -> None:
    for split, letters in (("train", "abcdef"), ("validation", "gh")):
        rows = [
            {
                "prompt": [*HI, {"role": "user", "content": f"c a f {x} e d"}],
                "solution": x,
                "reference": "ok",
            }
            for x in letters
        ]
        long = f"{LONG} {letters[0]}"
        rows.insert(1, {"prompt": long, "solution": "a", "reference": "ok"})
        rows.insert(3, {"prompt": [*HI, {"role": "user", "content": long}], "solution": "b"})
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(text)


def values(folder: Path, **data: object) -> dict[str, object]:
    return {
        "model": {"path": "lab:two_styles", "templates": "lab"},
        "data": {
            "type": "files", "train": str(folder / "train.jsonl"),
            "validation": str(folder / "validation.jsonl"), **data,
        },
        "context": {"type": "reference"},
        "sampling": {"max_tokens": 40, "batch_size": 8},
        "train": {
            "steps": 2, "problems_per_step": 2, "group_size": 2, "threads": 1, "max_length": 90,
        },
        "evaluation": {"every": 2, "validation_k": 1, "test": False},
    }  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_problems(tmp_path)
    return tmp_path


def recipe(folder: Path, **data: object) -> Recipe:
    return Recipe.model_validate(values(folder, **data))


def test_an_overlong_prompt_stops_a_run_and_says_what_would_drop_it(folder: Path) -> None:
    with pytest.raises(DataError) as caught:
        build(recipe(folder))
    message = str(caught.value)
    assert "problem 'train-2' has a prompt of 123 tokens" in message and "\n" not in message
    assert "so does 1 other of its split" in message
    assert message.endswith('data.overlong = "drop" leaves such problems out')


def test_overlong_prompts_are_dropped_and_counted_in_the_run_and_in_check(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    counts = {"rows": 12, "overlong in train": 2, "overlong in validation": 2}
    run = train(recipe(folder, overlong="drop"), folder / "run")
    next(run)
    run.close()
    stored = json.loads((folder / "run" / "problems.json").read_text())
    assert stored["train"]["problems"] == 6 and stored["validation"]["problems"] == 2
    assert stored["counts"] == counts
    assert "overlong in train: 2 prompts" in caplog.text
    run_to_end(recipe(folder, overlong="drop"), folder / "run")  # it is resumed with the same ones
    assert RunFolder(folder / "run").config()["data"]["overlong"] == "drop"
    rows = [
        json.loads(line)
        for path in (folder / "run" / "samples").glob("*.jsonl")
        for line in path.read_text().splitlines()
    ]
    assert rows and all(row["history"] == HI for row in rows)
    for offline in (False, True):
        text = "\n".join(
            describe_study(study_from(values(folder, overlong="drop")), offline=offline)
        )
        assert "2 overlong in train, 2 overlong in validation" in text
        assert "columns: question from prompt, answer from solution" in text


def test_a_split_that_would_be_empty_stops_the_run(folder: Path) -> None:
    row = {"prompt": LONG, "solution": "a"}
    (folder / "validation.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match="problem 'validation-1' has a prompt of 122 tokens"):
        build(recipe(folder, overlong="drop"))


def test_a_file_to_evaluate_on_is_treated_as_the_recipe_s_problems(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dropping = recipe(folder, overlong="drop")
    (folder / "held_out.jsonl").write_text((folder / "train.jsonl").read_text())
    problems, name = named_problems(build(dropping), str(folder / "held_out.jsonl"), dropping)
    assert (len(problems), name) == (6, "held_out")
    assert "overlong in test: 2 prompts" in caplog.text
