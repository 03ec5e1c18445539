"""Shipped recipes are found by name from any folder; a file of one's own comes first."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

from selfteach.api import load_recipe
from selfteach.cli import app
from selfteach.config.recipe_file import load_study
from selfteach.config.shipped_recipes import FOLDER, find_recipe, shipped_recipes, summary_of
from selfteach.errors import RecipeError

ROOT = Path(__file__).parents[3]
NAMES = list(shipped_recipes())


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_every_recipe_is_there() -> None:
    assert {"paper", "paper_in_miniature", "smollm2_critic", "baselines/sdpo"} <= set(NAMES)
    assert not any(name.startswith("shared") for name in NAMES)
    assert len(NAMES) == len(list(FOLDER.glob("*.toml"))) + len(list(FOLDER.glob("baselines/*")))


@pytest.mark.parametrize("name", NAMES)
def test_a_name_loads_from_any_folder_and_a_printed_recipe_does_too(
    name: str, tmp_path: Path
) -> None:
    study = load_study(name)
    assert load_study(f"{name}.toml") == study == load_study(Path("recipes") / f"{name}.toml")
    printed = CliRunner().invoke(app, ["recipes", name]).stdout
    mine = tmp_path / shipped_recipes()[name].name
    mine.write_text(printed, encoding="utf-8")
    assert load_study(mine) == study


def test_a_baseline_needs_no_folder_name() -> None:
    assert find_recipe("sdpo") == find_recipe("baselines/sdpo")
    assert load_recipe("sdpo").context.type == "peer"


def test_a_file_comes_first_and_a_folder_last(tmp_path: Path) -> None:
    (tmp_path / "paper").mkdir()
    assert find_recipe("paper") == FOLDER / "paper.toml"
    (tmp_path / "paper.toml").write_text('[context]\ntype = "reference"\n')
    assert list(load_study("paper.toml").arms) == ["paper"]
    assert len(load_study("paper").arms) == 3


def test_a_recipe_extends_a_shipped_one(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text('extends = "paper"\n[context]\ntype = "reference"\n')
    recipe = load_recipe("mine.toml")
    assert (recipe.sampling.max_tokens, recipe.context.type) == (2048, "reference")
    (tmp_path / "mine.toml").write_text('extends = "papers/base.toml"\n')
    with pytest.raises(RecipeError, match=r"papers/base\.toml: no such recipe"):
        load_recipe("mine.toml")


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("papr", r"papr: no such recipe; .* paper, .*baselines/vopd \(did you mean 'paper'\?\)"),
        ("sdpoo", r"did you mean 'baselines/sdpo'"),
        ("../paper", r"no such recipe"),
        ("mine/recipe.toml", r"mine/recipe\.toml: no such recipe; name a TOML file by its path"),
        (".", r"is a folder; name the recipe file"),
    ],
)
def test_an_unknown_name_lists_the_shipped_ones(name: str, line: str) -> None:
    for load in (load_study, load_recipe):
        with pytest.raises(RecipeError, match=line):
            load(name)


def test_the_list_says_what_each_recipe_is() -> None:
    lines = CliRunner().invoke(app, ["recipes"]).stdout.splitlines()
    assert [line.split()[0] for line in lines] == NAMES
    for name, file in shipped_recipes().items():
        assert len(summary_of(file)) > 20, name


def test_the_wheel_holds_them(tmp_path: Path) -> None:
    """Build the wheel and load a recipe by name from it alone, as an installed package does."""
    pytest.importorskip("hatchling")
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "src"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    build = "import sys; from hatchling.build import build_wheel; build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, tmp_path], cwd=source, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    script = (
        "import selfteach; from selfteach.config.recipe_file import load_study;"
        f"[load_study(name) for name in {NAMES}]; print(selfteach.__file__)"
    )
    found_in = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, check=True, text=True, capture_output=True,
        env={"PYTHONPATH": str(tmp_path / "installed")},
    ).stdout  # fmt: skip
    assert str(tmp_path / "installed") in found_in
