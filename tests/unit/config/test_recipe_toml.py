"""The recipe.toml of a run folder loads as the recipe of the run."""

from __future__ import annotations

from pathlib import Path

import pytest

from selfteach.config.recipe_file import load_study
from selfteach.config.recipe_toml import is_recipe, recipe_toml
from selfteach.runtime.run_folder import RunFolder

ROOT = Path(__file__).parents[3]
FILES = sorted([*ROOT.glob("src/selfteach/recipes/**/*.toml"), *ROOT.glob("experiments/**/*.toml")])
RECIPES = [file for file in FILES if file.name not in ("published.toml", "gains.toml")]


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: str(file.relative_to(ROOT)))
def test_every_recipe_comes_back(file: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    study = load_study(file)
    for arm in study.arms:
        recipe = study.recipe(arm, seed=3)
        folder = tmp_path / arm
        RunFolder(folder).create(recipe.model_dump(mode="json"), {"versions": {}})
        written = load_study(folder / "recipe.toml")
        assert list(written.arms) == ["recipe"]
        assert written.recipe("recipe", seed=3) == recipe


def test_a_resumed_run_of_an_earlier_version_gets_one(tmp_path: Path) -> None:
    recipe = load_study("paper").recipe("reference", seed=1)
    RunFolder(tmp_path).create(recipe.model_dump(mode="json"), {"versions": {}})
    (tmp_path / "recipe.toml").unlink()
    RunFolder(tmp_path).create(recipe.model_dump(mode="json"), {"versions": {}})
    assert load_study(tmp_path / "recipe.toml").recipe("recipe", seed=1) == recipe


def test_a_selections_config_is_no_recipe() -> None:
    assert not is_recipe({"recipe": {}, "select": {}})
    assert recipe_toml({"seed": 4, "model": {"lora": None}}).startswith(
        "# selfteach train recipe.toml --seed 4"
    )
