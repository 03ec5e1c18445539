"""The names that a notebook imports: recipes by path or name, and str or Path everywhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from selfteach import api
from selfteach.analysis.critic_statistics import read_study_critics
from selfteach.analysis.inspection.inspection_summary import save_figures, summarize
from selfteach.analysis.report.page import write_report
from selfteach.analysis.run_data import read_run, read_runs
from selfteach.commands.select.selection import card_of, is_complete, select
from selfteach.commands.study.run_study import run_study
from selfteach.config.data_section import SelectConfig, Splitting
from selfteach.config.recipe_file import load_study
from selfteach.errors import CheckpointError, RecipeError
from selfteach.runtime.run_folder import load_result
from selfteach.trainer.loop import train

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
    summary = summarize(str(tmp_path / "str"))
    assert (
        summary["with_first_error"] >= 0 and summarize(tmp_path / "path").keys() == summary.keys()
    )
    save_figures(str(tmp_path / "str"), summary)


def test_a_folder_may_be_a_text_everywhere(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = ["evaluation.test_k=1", "evaluation.validation_k=1", "guard.idle_steps=0"]
    rows = list(train(api.load_recipe("recipe.toml", "distilled", settings=settings), "run"))
    assert rows and load_result("run")
    assert read_run("run").arm == "run" and len(read_runs("run")) == 1
    assert write_report("run", out="page.html") == Path("page.html")
    assert api.evaluate("run", k=1)["problems"] == 2
    quiet = {"command": "", "progress": lambda jobs: None, "summarize": lambda folder: None}
    with pytest.raises(CheckpointError, match="run is not empty"):
        run_study(load_study("recipe.toml"), "run", **quiet)
    assert read_study_critics("run") == {}
    lab = api.load_recipe("recipe.toml", "distilled")
    few = SelectConfig(samples=1, critic=False, max_solve_rate=1.0, min_format_rate=0.0)
    few = few.model_copy(update={"split": Splitting(validation=1, test=1)})
    list(select(lab, few, "selected"))
    assert is_complete("selected") and card_of("selected")["in"] == 4
    forecast = api.forecast_recipe("recipe.toml", api.ForecastRequest(1, 2), arms=["grpo"], out="f")
    assert set(forecast["arms"]) == {"grpo"} and Path("f/forecast.json").exists()
