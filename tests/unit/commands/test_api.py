"""The names that a notebook imports: recipes by path or name, and str or Path everywhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from selfteach import api
from selfteach.errors import RecipeError

TWO_ARMS = """
[data]
type = "lab"
train = 4
validation = 2
test = 1
[sampling]
max_tokens = 40
[train]
steps = 1
problems_per_step = 2
group_size = 2
[arms.grpo]
objective = { type = "grpo" }
[arms.distilled]
context = { type = "reference" }
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "recipe.toml"
    file.write_text(TWO_ARMS)
    return file


def test_load_recipe_takes_paths_arms_seeds_and_settings(path: Path) -> None:
    recipe = api.load_recipe(path, arm="distilled", seed=3, settings=["train.steps=7"])
    assert (recipe.seed, recipe.train.steps, recipe.context.type) == (3, 7, "reference")
    assert api.load_recipe(str(path), "grpo") == api.load_recipe(path, "grpo", 0, ())
    with pytest.raises(RecipeError, match=r"several arms; name one: --arm grpo\|distilled"):
        api.load_recipe(path)
    with pytest.raises(RecipeError, match="no such recipe"):
        api.load_recipe("nowhere")


def test_a_notebook_builds_trains_evaluates_and_inspects(path: Path, tmp_path: Path) -> None:
    built = api.build(api.load_recipe(path, "distilled"))
    samples, metrics = api.train_step(built.components, built.task.train[:2])
    assert len(samples) == 4 and metrics["tokens_trained"] > 0
    problems = tmp_path / "problems.jsonl"
    problems.write_text('{"question": "a b c d e f", "answer": "g"}\n')
    results = [
        api.evaluate("lab:two_styles", problems=file, k=2) for file in (problems, str(problems))
    ]
    assert results[0] == results[1] and results[0]["problems"] == 1
    request = api.InspectionRequest(("reference",), k=1, limit=1)
    for folder in (tmp_path / "path", str(tmp_path / "str")):
        inspection = api.inspect(Path("lab:two_styles"), request, folder)
        assert json.loads((Path(folder) / "inspection.json").read_text()) == inspection
