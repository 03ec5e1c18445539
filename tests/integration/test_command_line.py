"""The command line runs a study end to end, and reports wrong input in one line."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from operator import truediv
from pathlib import Path

import pytest
from command_line import exit_status
from jobs_here import jobs_in_this_process

import selfteach
from selfteach.commands.study.jobs import run_jobs
from selfteach.commands.study.run_study import jobs_of
from selfteach.config.recipe_file import BASE, load_study
from selfteach.runtime.provenance import cpu_capability
from selfteach.runtime.run_folder import RunFolder

RECIPE = """
[model]
path = "lab:two_styles"
[data]
type = "lab"
train = 8
validation = 3
test = 4
[sampling]
max_tokens = 40
batch_size = 8
[train]
steps = 2
problems_per_step = 2
group_size = 3
[evaluation]
every = 2
validation_k = 2
test_k = 3
[study]
title = "tiny"
seeds = [0, 1]
headline = ["step_aligned-grpo"]
inspect_answers = 8
[arms.grpo]
objective = { type = "grpo" }
[arms.step_aligned]
critic = { type = "oracle" }
context = { type = "step_aligned" }
[variants.easy]
title = "an easy world"
seeds = [0]
set = { model = { path = "lab:easy" } }
[sweep]
lr = [1e-4, 1e-3]
seeds = [100]
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE)
    return path


def refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object
) -> str:
    """Return the error line of a failing call: exactly one line, exit status 2."""
    assert exit_status(monkeypatch, *words) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("selfteach: ") and printed.err.count("\n") == 1, printed.err
    return printed.err


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Run a study with one worker; return its folder and what it printed."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "recipe.toml").write_text(RECIPE)
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        words = ("study", folder / "recipe.toml", "--set", "study.workers=1")
        assert exit_status(patch, *words, "--out", folder / "out") == 0
    return folder / "out", printed.getvalue()


def test_a_study_from_recipe_to_report(
    study: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    out, printed = study
    for word in ("base", "grpo", "step_aligned", "Avg@3", "report.html"):
        assert word in printed
    results = json.loads((out / "results.json").read_text())
    for arm in ("base", "grpo", "step_aligned"):
        for measure in ("avg", "pass", "maj", "length", "truncated", "format"):
            estimate = results["arms"][arm][measure]
            low, high = estimate["ci95"]
            assert low <= estimate["mean"] <= high
            assert list(estimate["per_seed"]) == ["0", "1"]
        assert results["arms"][arm]["budget"]["evaluation_rollouts"] > 0
    assert set(results["paired"]) == {"step_aligned-grpo", "grpo-base", "step_aligned-base"}
    difference = results["paired"]["step_aligned-grpo"]["avg"]["mean"]
    means = {arm: results["arms"][arm]["avg"]["mean"] for arm in results["arms"]}
    assert difference == pytest.approx(means["step_aligned"] - means["grpo"])
    budgets = [results["arms"][arm]["budget"] for arm in ("grpo", "step_aligned")]
    assert budgets[0]["rollouts_sampled"] == budgets[1]["rollouts_sampled"] == 12
    # In so small a study all groups of grpo may score alike, and then there is nothing to learn.
    assert budgets[0]["optimizer_steps"] <= budgets[1]["optimizer_steps"] == 2
    easy = results["variants"]["easy"]
    assert easy["title"] == "an easy world"
    assert list(easy["arms"]) == list(results["arms"]) == ["base", "grpo", "step_aligned"]
    report = (out / "report.html").read_text(encoding="utf-8")
    assert len(report) > 10_000 and "Outcomes: rollouts, critiques by case" in report
    inspected = json.loads((out / "inspection" / "inspection.json").read_text())
    assert inspected["answers"] == 8 and "step_aligned" in inspected["contexts"]
    assert (out / "inspection" / "localisation.json").exists()
    jobs_in_this_process(monkeypatch)
    scored_at = (out / "inspection" / "tokens.parquet").stat().st_mtime_ns
    before = (out / "results.json").read_text()
    assert exit_status(monkeypatch, "resume", out) == 0  # nothing left to do: the same numbers
    after = json.loads((out / "results.json").read_text())
    assert after["arms"] == json.loads(before)["arms"]
    assert (out / "inspection" / "tokens.parquet").stat().st_mtime_ns == scored_at
    assert after["made"]["seconds"] > json.loads(before)["made"]["seconds"], "seconds accumulate"
    assert after["made"]["processor"] == cpu_capability()
    capsys.readouterr()
    assert exit_status(monkeypatch, "watch", out, "--once") == 0
    watched = capsys.readouterr().out
    assert "9 of 9 runs complete" in watched and "easy step_aligned 0" in watched
    two = [out / "runs" / arm / "seed_0" for arm in ("grpo", "step_aligned")]
    assert exit_status(monkeypatch, "report", *two, "--out", out / "two.html") == 0
    assert "step_aligned − grpo" in (out / "two.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_an_error_of_the_inspection_is_raised_after_all_runs(recipe: Path, tmp_path: Path) -> None:
    study = load_study(
        recipe, ["study.seeds=[0, 1, 2, 3]"]
    )  # more than fit into the worker's queue
    jobs = [job for job in jobs_of(study, tmp_path / "out") if job.arm == BASE]
    with pytest.raises(ZeroDivisionError):
        run_jobs(jobs, 1, lambda _: None, also=partial(truediv, 1, 0))
    assert all(RunFolder(job.folder).is_complete for job in jobs)


@pytest.mark.slow
def test_a_killed_study_resumes_with_the_same_results(
    study: tuple[Path, str], recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed by a signal with two runs in parallel; equal to sequential runs."""
    out = tmp_path / "out"
    words = [sys.executable, "-m", "selfteach", "study", recipe, "--set", "study.workers=2"]
    process = subprocess.Popen(
        [*words, "--out", out], env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not list(out.glob("runs/*/seed_0/samples/step_000001.jsonl")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert exit_status(monkeypatch, "resume", out) == 0
    ours, theirs = (json.loads((f / "results.json").read_text()) for f in (out, study[0]))
    for results in (ours, theirs):
        for arm in [*results["arms"].values(), *results["variants"]["easy"]["arms"].values()]:
            arm["budget"].pop("seconds")
    assert ours["arms"] == theirs["arms"] and ours["variants"] == theirs["variants"]


def test_check_prints_sizes_and_budget_and_writes_nothing(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    before = set(tmp_path.rglob("*"))
    assert exit_status(monkeypatch, "check", recipe) == 0
    printed = capsys.readouterr().out
    rollouts = "12 rollouts (at most 480 tokens)"
    assert f"# grpo, per seed\n{rollouts}, 0 critiques, 2 optimizer steps" in printed
    assert f"# step_aligned, per seed\n{rollouts}, 12 critiques" in printed
    assert "8 train, 3 validation, 4 test" in printed
    assert set(tmp_path.rglob("*")) == before


def test_train_and_evaluate(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "run"
    assert (
        exit_status(monkeypatch, "train", recipe, "--out", out, "--arm", "grpo", "--seed", 3) == 0
    )
    capsys.readouterr()
    table = tmp_path / "evaluation.json"
    for model in (out, out / "checkpoints" / "step_000002", out / "model", "lab:two_styles"):
        words = ("evaluate", model, "--recipe", recipe, "-k", 2, "--out", table)
        assert exit_status(monkeypatch, *words) == 0
        assert "Avg@2" in capsys.readouterr().out
        result = json.loads(table.read_text())
        assert result["problems"] == 3 and result["k"] == 2
    problems = tmp_path / "own.jsonl"
    problems.write_text('{"question": "a b c d e f", "answer": "g"}\n')
    assert (
        exit_status(monkeypatch, "evaluate", out, "--problems", problems, "-k", 2, "--out", table)
        == 0
    )
    assert json.loads(table.read_text())["problems"] == 1


def test_the_sweep_never_scores_test_and_records_its_choice(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs_in_this_process(monkeypatch)
    record = tmp_path / "sweep.json"
    words = ("sweep", recipe, "--out", tmp_path / "sweep", "--record", record)
    words += ("--set", "study.workers=1")
    assert exit_status(monkeypatch, *words) == 0
    table = json.loads(record.read_text())["settings"]["main"]["grpo"]
    assert set(table["avg"]) == {"0.0001", "0.001"}
    best = max(table["mean"], key=lambda lr: table["mean"][lr])
    assert table["chosen"] == float(best)
    assert not list((tmp_path / "sweep").rglob("test_*"))
    before = (tmp_path / "sweep" / "sweep.json").read_text()
    assert exit_status(monkeypatch, "resume", tmp_path / "sweep") == 0  # as a sweep, not as a study
    assert (tmp_path / "sweep" / "sweep.json").read_text() == before
    assert not list((tmp_path / "sweep").rglob("test_*"))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("optimizer.lrr=1", "did you mean 'lr'?"),
        ("modell.path=x", "did you mean 'model'?"),
        ("optimizer.lr=-1", "greater than 0"),
        ("train.group_size=1", "train.group_size of at least 2"),
        ("data.type=labb", "'labb': did you mean 'lab'?"),
        ("model.path=lab:nowhere", "no such base model"),
        ("model.path=/no/such/model", "/no/such/model"),
        ("model.path=package:no_such_package", "not installed"),
        ("model.templates=nowhere", "no such template set"),
        ("model.device=mps", "not supported"),
        ("train.max_length=20", "exceeds the context"),
        ("train.max_length=4096", "supports 256"),
        ("data.world=mars", "known worlds"),
        ("study.headline=['grpo-nothing']", "study.headline"),
        ("nonsense", "key=value"),
        ("arms.step_aligned.objective.support=top_k", "top_k"),
        ("arms.step_aligned.objective.beta=3.0", "beta"),
    ],
)
def test_a_wrong_value_is_one_line(
    setting: str,
    message: str,
    recipe: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert message in refused(monkeypatch, capsys, "check", recipe, "--set", setting)


def test_a_wrong_call_is_one_line(
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def error(*words: object) -> str:
        return refused(monkeypatch, capsys, *words)

    assert "no such recipe" in error("check", tmp_path / "nothing.toml")
    assert "name the recipe file" in error("check", tmp_path)
    broken = tmp_path / "broken.toml"
    broken.write_text("[model\n")
    assert "not valid TOML" in error("check", broken)
    assert "--arm grpo|step_aligned" in error("train", recipe, "--out", tmp_path / "x")
    assert "did you mean 'grpo'?" in error("train", recipe, "--out", tmp_path / "x", "--arm", "grp")
    assert "no such folder" in error("resume", tmp_path / "nowhere")
    assert "no run folder" in error("resume", tmp_path)
    assert "no folder of a run" in error("report", tmp_path)
    assert "neither a run nor a study" in error("watch", tmp_path)
    assert "not empty" in error("study", recipe, "--out", tmp_path)
    assert "is a file" in error("study", recipe, "--out", recipe)
    assert "Missing option" in error("study", recipe)
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    assert "is empty" in error("evaluate", "lab:two_styles", "--problems", empty)
    wrong = tmp_path / "wrong.jsonl"
    wrong.write_text('{"question": "a"}\n')
    assert "no such folder" in error("evaluate", tmp_path / "nowhere")
    assert "no folder of a run" in error("report", tmp_path / "nowhere")
    assert "no such file" in error("critique", tmp_path / "nowhere.jsonl")
    dial = (
        "--set",
        "arms.step_aligned.context.type=partly_aligned",
        "--set",
        "data.type=chain_sums",
    )
    assert "only the lab" in error("check", recipe, *dial, "--set", "model.templates=lab")
    assert "wrong.jsonl:1" in error("evaluate", "lab:two_styles", "--problems", wrong)
    assert not (tmp_path / "x").exists()


def test_a_folder_with_another_study_is_refused(
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "study.json").write_text('{"study": {}}')
    (out / "runs").mkdir()
    (out / "runs" / "metrics.jsonl").write_text("{}\n")
    error = refused(monkeypatch, capsys, "study", recipe, "--out", out)
    assert "holds another study" in error and "selfteach resume" in error


@pytest.mark.parametrize("words", [(), ("--help",)])
def test_help_lists_every_command(
    words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_status(monkeypatch, *words) == 0
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) > 20
    commands = (
        "study", "train", "resume", "evaluate", "inspect", "critique", "check", "report", "watch",
        "sweep",
    )  # fmt: skip
    for command in commands:
        assert command in printed


def test_version_is_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_status(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"selfteach {selfteach.__version__}\n"
