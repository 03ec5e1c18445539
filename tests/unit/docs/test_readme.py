"""The README quotes the code that runs, and its recipe is valid."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from selfteach.config.recipe_file import study_from
from selfteach.trainer import step

README = (Path(__file__).parents[3] / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_step_is_quoted_verbatim() -> None:
    source = Path(step.__file__).read_text()
    (quoted,) = (block for block in blocks("python") if "def train_step" in block)
    assert f"\n{quoted}" in source


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 150


def test_the_recipe_is_valid_and_short() -> None:
    (arms,) = blocks("toml")
    assert {"grpo", "reference", "step_aligned"} == set(study_from(tomllib.loads(arms)).arms)
    assert len([line for line in arms.splitlines() if line.strip()]) <= 15
