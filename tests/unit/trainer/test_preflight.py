"""Preflight asks each server once, and checks folders and packages, before anything is spent."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from selfteach.config.recipe import Recipe
from selfteach.config.schema import merge, validate
from selfteach.errors import CriticError, RecipeError
from selfteach.trainer import build_critic, build_engine
from selfteach.trainer.preflight import preflight

ENDPOINT = {"type": "endpoint", "base_url": "http://a/v1", "model": "m"}
BASE = {"context": {"type": "step_aligned"}, "critic": ENDPOINT}
SERVER = {"type": "vllm_server", "model": "m"}


def recipe(**changes: Any) -> Recipe:
    return validate(Recipe, merge(BASE, changes), where="test")


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """Record which critics and engines are asked instead of asking them."""
    asked_servers: list[tuple[str, Any]] = []

    def critic(config: Any) -> list[str]:
        asked_servers.append(("critic", config.base_url))
        return ["replies"]

    def engine(asked_recipe: Recipe) -> list[str]:
        asked_servers.append(("engine", asked_recipe.sampling.max_tokens))
        return ["replies"]

    monkeypatch.setattr(build_critic, "require_served_model", critic)
    monkeypatch.setattr(build_engine, "require_engine", engine)
    return asked_servers


def test_each_distinct_server_is_asked_once(requests: list[tuple[str, Any]]) -> None:
    runs = [
        recipe(engine=SERVER, sampling={"max_tokens": 100}),
        recipe(engine=SERVER, sampling={"max_tokens": 300}, critic={"max_tokens": 64}, seed=1),
        recipe(engine=SERVER, sampling={"max_tokens": 200}, critic={"base_url": "http://b/v1"}),
    ]
    preflight(iter(runs))
    assert requests == [("critic", "http://a/v1"), ("critic", "http://b/v1"), ("engine", 300)]


def test_critic_only_asks_no_engine(requests: list[tuple[str, Any]]) -> None:
    preflight([recipe(engine=SERVER)], critic_only=True)
    assert requests == [("critic", "http://a/v1")]


def test_a_recipe_may_turn_the_healthcheck_off(requests: list[tuple[str, Any]]) -> None:
    preflight([recipe(critic={"healthcheck": False}), recipe(critic={"type": "oracle"})])
    preflight([validate(Recipe, {"context": {"type": "reference"}})])
    assert requests == []


def test_a_missing_package_is_reported_before_any_server_is_asked(
    requests: list[tuple[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match='"trackio" needs the package trackio: pip install'):
        preflight([recipe(), recipe(tracking={"sinks": ["trackio"]})])
    assert requests == []


def test_the_folder_of_a_recorded_critic_must_exist(tmp_path: Path) -> None:
    recorded = {"context": {"type": "step_aligned"}}
    run = {"type": "recorded", "run": str(tmp_path / "nowhere")}
    with pytest.raises(CriticError, match=r"critic\.run = .*nowhere': no such folder"):
        preflight([validate(Recipe, {**recorded, "critic": run})])
    preflight([validate(Recipe, {**recorded, "critic": {**run, "run": str(tmp_path)}})])
    # A study may replay one of its own runs, which another job makes first.
    replayed = validate(Recipe, {**recorded, "critic": run})
    preflight([replayed], output_folders=[tmp_path / "nowhere" / "seed_0"])
    with pytest.raises(CriticError, match="no such folder"):
        preflight([replayed], output_folders=[tmp_path / "elsewhere"])


def test_preflight_imports_no_torch_without_a_server() -> None:
    code = (
        "import sys\n"
        "from selfteach.config.recipe import Recipe\n"
        "from selfteach.trainer.preflight import preflight\n"
        "preflight([Recipe.model_validate({'context': {'type': 'reference'}})])\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
