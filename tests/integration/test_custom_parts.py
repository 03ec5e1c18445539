"""Parts of one's own go through the commands as ours do; the examples of each kind run."""

from __future__ import annotations

import json
import shutil
import sys
import tomllib
from pathlib import Path

import pytest

import selfteach
from selfteach import api, cli
from selfteach.config.recipe_file import load_study
from selfteach.errors import CheckpointError, PartError
from selfteach.trainer.loop import run_to_end
from selfteach.types import Critique, CritiqueFailure, CritiqueStep, Verdict

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "parts"
ARMS = [
    *((EXAMPLES / "recipe.toml", arm) for arm in load_study(EXAMPLES / "recipe.toml").arms),
    *((EXAMPLES / "problems.toml", arm) for arm in load_study(EXAMPLES / "problems.toml").arms),
    (EXAMPLES / "environment.toml", "environment"),
]
SMALL = (
    "data.train=8", "data.validation=2", "data.test=2", "train.steps=1", "train.problems_per_step=2",
    "evaluation.validation_k=1", "evaluation.test_k=1",
)  # fmt: skip


def small(recipe: Path) -> list[str]:
    """Return settings that make a run of the examples short."""
    return [s for s in SMALL if recipe.stem == "recipe" or not s.startswith("data.")]


def command(*words: object) -> None:
    cli.app([str(word) for word in words], standalone_mode=False)


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    """Copies of the examples that a test may change; none is left on the path of imports."""
    shutil.copytree(EXAMPLES, tmp_path / "parts")
    return tmp_path / "parts"


@pytest.mark.parametrize(
    ("recipe", "arm"),
    [
        pytest.param(
            path, arm, id=f"{path.stem}:{arm}",
            marks=() if arm == "objective" else pytest.mark.slow,
        )
        for path, arm in ARMS
    ],
)  # fmt: skip
def test_an_example_of_each_kind_trains_and_resumes(
    recipe: Path, arm: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [word for setting in small(recipe) for word in ("--set", setting)]
    command("train", recipe, "--arm", arm, "--out", tmp_path / "run", *settings)
    stored = json.loads((tmp_path / "run" / "parts.json").read_text())["parts"]
    for key, row in stored.items():
        assert len(row["sha256"]) == 64 and list((tmp_path / "run" / "parts" / key).iterdir())
    result = (tmp_path / "run" / "result.json").read_text()
    (tmp_path / "run" / "result.json").unlink()
    command("resume", tmp_path / "run")
    assert (
        json.loads((tmp_path / "run" / "result.json").read_text())["curve"]
        == json.loads(result)["curve"]
    )
    page = (tmp_path / "run" / "report.html").read_text()
    assert str(EXAMPLES) not in page  # no folder of this machine
    assert str(EXAMPLES) not in (tmp_path / "run" / "recipe.toml").read_text()
    load_study(tmp_path / "run" / "recipe.toml")


def test_check_runs_the_contracts_of_the_examples(capsys: pytest.CaptureFixture[str]) -> None:
    command("check", EXAMPLES / "recipe.toml")
    lines = capsys.readouterr().out.splitlines()
    held = {line.partition(":")[0] for line in lines if "its contract holds on" in line}
    assert held == {
        "data.verifier", "data.steps", "critic", "context", "objective", "teacher",
        "reward.functions.1", "reward.functions.2",
    }  # fmt: skip
    command("check", "--offline", EXAMPLES / "problems.toml")
    assert "its contract was not checked" in capsys.readouterr().out


def test_a_metric_of_ones_own_is_logged(tmp_path: Path) -> None:
    recipe = api.load_recipe(EXAMPLES / "recipe.toml", "objective", settings=SMALL)
    run_to_end(recipe, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    (step,) = [row for row in rows if row["kind"] == "step"]
    assert step["objective/surprise"] > 0 and "clip_fraction" not in step


@pytest.mark.slow
def test_study_sweep_select_forecast_inspect_and_report_take_parts(
    parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = parts / "all.toml"
    text = (parts / "problems.toml").read_text().partition("[arms.")[0]
    recipe.write_text(
        text.replace("critic = false", "")
        + '[critic]\ntype = "./critic.py:FromReference"\n[study]\nworkers = 1\ninspect_answers = 2\n'
        "[train]\nsteps = 1\nproblems_per_step = 2\n[select]\nsamples = 2\nmax_solve_rate = 1.0\n"
        "min_format_rate = 0.0\nsplit = { validation = 1, test = 1 }\n"
        "[sweep]\nlr = [1e-4]\nseeds = [5]\n"
        '[arms.own_context.context]\ntype = "./context.py:part_of_reference"\noptions = { lines = 1 }\n'
        '[arms.own_teacher]\ncontext = { type = "step_aligned" }\n'
        'teacher = { type = "./teacher.py:LateTeacher" }\n'
    )
    command("sweep", recipe, "--out", tmp_path / "sweep")
    command("study", recipe, "--out", tmp_path / "study")
    command("report", tmp_path / "study")
    inspected = json.loads((tmp_path / "study" / "inspection" / "inspection.json").read_text())
    assert "context.py:part_of_reference(lines=1)" in inspected["contexts"]
    command("forecast", recipe, "--out", tmp_path / "forecast", "--problems", 2, "-k", 2)
    command("select", recipe, "--out", tmp_path / "selected", "--arm", "own_context")
    card = (tmp_path / "selected" / "README.md").read_text()
    assert 'verifier = { type = "./parts/data.verifier/verifier.py:FirstAnswer" }' in card
    run = tmp_path / "study" / "runs" / "own_context" / "seed_0"
    command("evaluate", run, "-k", 1)
    named = f"reference,{parts}/context.py:part_of_reference"
    command("inspect", run, "--contexts", named, "--out", tmp_path / "inspection", "-k", 1)
    command("critique", run / "rollouts" / "step_000001.000.jsonl")
    shutil.rmtree(parts)
    command("resume", tmp_path / "study")
    command("evaluate", run, "-k", 1)


def test_a_resume_with_another_source_is_refused_until_it_is_accepted(
    parts: Path, tmp_path: Path
) -> None:
    settings = [word for setting in SMALL for word in ("--set", setting)]
    run = tmp_path / "run"
    command("train", parts / "recipe.toml", "--arm", "critic", "--out", run, *settings)
    (run / "result.json").unlink()
    with (parts / "critic.py").open("a") as file:
        file.write("# another line\n")
    with pytest.raises(CheckpointError, match=r"its critic critic.py:FromReference has changed"):
        command("resume", run)
    with pytest.raises(CheckpointError, match=r"has changed since this run began \(critic.py\)"):
        command("train", parts / "recipe.toml", "--arm", "critic", "--out", run, *settings)
    command("resume", run, "--accept-parts")
    assert len(json.loads((run / "parts.json").read_text())["earlier"]) == 1


class Mine:
    """A critic with what a name cannot give it."""

    def __init__(self, seen: list[int]) -> None:
        self.seen = seen

    def __call__(self, judged: list) -> list:
        self.seen.append(len(judged))
        return [
            CritiqueFailure("right")
            if verdict.correct
            else Critique("D", (CritiqueStep("a", "new"),), rollout.problem.answer, 0)
            for rollout, verdict in judged
        ]


def test_train_takes_objects_and_a_resume_needs_them(tmp_path: Path) -> None:
    seen: list[int] = []
    given = {
        "recipe": EXAMPLES / "recipe.toml", "folder": tmp_path / "run", "arm": "splitter",
        "settings": SMALL,
    }  # fmt: skip
    components = {
        "critic": Mine(seen),
        "splitter": lambda text: [(0, len(text))],
        "verifier": lambda problem, text: Verdict.of_final("#" in text, "x"),
    }
    selfteach.train(**given, components=components)
    assert seen == [4]
    (tmp_path / "run" / "result.json").unlink()
    with pytest.raises(CheckpointError, match=r"began with a \w+ from Python"):
        command("resume", tmp_path / "run")
    result = selfteach.train(**given, components=components)
    assert result["budget"]["rollouts_sampled"] == 4 and seen == [4]


def test_a_table_of_problems_and_a_wrong_kind(tmp_path: Path) -> None:
    row = {"question": "c a f f e d", "answer": "k", "reference": "a"}
    other = {**row, "question": "a c f f e d"}
    held_out = [{**row, "question": "d c f f e d"}]
    built = api.build(
        api.load_recipe(EXAMPLES / "problems.toml", "reference"),
        {"problems": {"train": [row, other], "validation": held_out}},
    )
    assert [len(getattr(built.task, s)) for s in ("train", "validation", "test")] == [2, 1, 0]
    with pytest.raises(PartError, match="no such kind; did you mean 'critic'"):
        selfteach.train(
            EXAMPLES / "recipe.toml", tmp_path, arm="critic", components={"critics": Mine([])}
        )


def test_the_names_of_the_package_are_those_of_the_api() -> None:
    assert sorted(selfteach.API) == sorted(api.__all__)
    with pytest.raises(AttributeError):
        _ = selfteach.nothing


def test_the_plugin_of_the_examples_offers_its_critic(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = ROOT / "examples" / "plugin"
    offered = tomllib.loads((package / "pyproject.toml").read_text())["project"]["entry-points"]
    info = tmp_path / "selfteach_terse-0.1.0.dist-info"  # what pip writes
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: selfteach-terse\nVersion: 0.1.0\n")
    lines = [
        f"[{group}]\n" + "\n".join(f"{name} = {value}" for name, value in names.items())
        for group, names in offered.items()
    ]
    (info / "entry_points.txt").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.syspath_prepend(package)
    settings = [*SMALL, "critic.type=terse", "critic.options={right_too=true}"]
    recipe = api.load_recipe(EXAMPLES / "recipe.toml", "splitter", settings=settings)
    result = run_to_end(recipe, tmp_path / "run")
    assert result["budget"]["critiques"] == 4
    stored = json.loads((tmp_path / "run" / "parts.json").read_text())["parts"]["critic"]
    assert stored["name"] == "terse" and list(stored["files"]) == ["selfteach_terse/__init__.py"]
    sys.modules.pop("selfteach_terse")
