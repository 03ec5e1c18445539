"""Rate and rollout length depend on the model alone: one of the lab is known by its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from selfteach.config.recipe import Recipe

LAB, REAL, ADAPTERS = (1e-3, 64), (1e-5, 1024), (1e-4, 1024)
FILES = {"type": "files", "pool": "problems.jsonl"}


def defaults(model: dict[str, Any], data: dict[str, Any] | None = None) -> tuple[float, int]:
    values = {"model": model, "context": {"type": "reference"}}
    recipe = Recipe.model_validate({**values, **({"data": data} if data else {})})
    return recipe.optimizer.lr, recipe.sampling.max_tokens


@pytest.mark.parametrize("data", [None, {}, {"type": "lab"}, {"train": 4}, FILES])
def test_the_model_decides_whatever_the_data(data: dict[str, Any] | None, tmp_path: Path) -> None:
    exported = tmp_path / "exported"
    exported.mkdir()
    (exported / "world.json").write_text("{}")
    for lab in ("lab:two_styles", "lab:easy", str(exported)):
        assert defaults({"path": lab}, data) == LAB, lab
    for real in ("Qwen/Qwen3-0.6B", str(tmp_path), "~nobody-of-this-name/model", "x" * 5000):
        assert defaults({"path": real}, data) == REAL, real
    assert defaults({"path": "Qwen/Qwen3-0.6B", "lora": {"rank": 8}}, data) == ADAPTERS
    assert defaults({}, data) == LAB  # the default model is the lab's


def test_a_home_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "world.json").write_text("{}")
    assert defaults({"path": "~/model"}) == LAB


def test_what_the_recipe_sets_wins() -> None:
    values = {
        "model": {"path": "Qwen/Qwen3-0.6B"},
        "context": {"type": "reference"},
        "optimizer": {"lr": 3e-6},
        "sampling": {"max_tokens": 7},
    }
    recipe = Recipe.model_validate(values)
    assert (recipe.optimizer.lr, recipe.sampling.max_tokens) == (3e-6, 7)
