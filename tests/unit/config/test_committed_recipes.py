"""Every committed recipe is valid, and has the learning rates that its sweep chose."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from selfteach.config.recipe_file import load_study

ROOT = Path(__file__).parents[3]
RECIPES = sorted(
    path
    for path in [*ROOT.glob("src/selfteach/recipes/**/*.toml"), *ROOT.glob("experiments/*/*.toml")]
    if path.name != "published.toml"  # figures, for scripts/reissue_tables.py
)
RECORDS = sorted(
    [*ROOT.glob("src/selfteach/recipes/*.sweep.json"), *ROOT.glob("experiments/*/*.sweep.json")]
)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: "/".join(path.parts[-2:]))
def test_recipe_parses_and_gives_every_arm_the_same_budget(path: Path) -> None:
    study = load_study(path)
    budgets = set()
    for arm in study.arms:
        train = study.recipe(arm, seed=0).train
        budgets.add((train.steps, train.problems_per_step * train.group_size))
    assert len(budgets) == 1


@pytest.mark.parametrize("record", RECORDS, ids=lambda path: path.name)
def test_the_recipe_uses_what_the_sweep_chose(record: Path) -> None:
    study = load_study(record.with_name(record.name.replace(".sweep.json", ".toml")))
    settings = json.loads(record.read_text())["settings"]
    assert study.sweep is not None
    assert not set(study.sweep.seeds) & set(study.study.seeds)
    for setting, arms in settings.items():
        variant = None if setting == "main" else setting
        assert set(arms) == set(study.arms)
        for arm, table in arms.items():
            assert {float(lr) for lr in table["avg"]} == set(study.sweep.lr)
            chosen = study.recipe(arm, seed=0, variant=variant).optimizer.lr
            assert chosen == table["chosen"], f"{setting}/{arm}"
