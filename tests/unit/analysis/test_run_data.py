"""Test what is computed from run folders: groups, comparison, health, curves, and watch."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from selfteach.analysis import health_checks, results_table, run_budget, run_comparison
from selfteach.analysis.figures import style, training_curves
from selfteach.analysis.report.answer_records import training_answers
from selfteach.analysis.report.compressed_records import compress_records, decompress
from selfteach.analysis.report.page import render
from selfteach.analysis.run_data import group_runs, read_run, read_runs
from selfteach.analysis.terminal.watch import run_statuses, watch
from selfteach.config.migrations import migrate_results
from selfteach.errors import CheckpointError

STEPS, K = 12, 4


def evaluation(right: list[int], *, k: int = K, ids: str = "abcd") -> dict:
    """Return an evaluation in which ``right`` of k answers are right, problem by problem."""
    correct = [[i < n for i in range(k)] for n in right]
    return {
        "split": "test", "step": STEPS, "k": k, "problem_ids": list(ids), "correct": correct,
        "formatted": [[True] * k] * len(right), "finished": [[True] * k] * len(right),
        "parsed": [["1" if c else "0" for c in row] for row in correct],
        "lengths": [[10] * k] * len(right),
    }  # fmt: skip


def write_run(
    folder: Path, *, seed: int = 0, lr: float = 1e-3, right=(2, 2, 2, 2), **metrics
) -> Path:
    """Write a run of 12 steps; ``metrics`` are constants, or one value per step."""
    folder.mkdir(parents=True)
    config = {
        "seed": seed, "context": {"type": "step_aligned"}, "optimizer": {"lr": lr},
        "train": {"steps": STEPS}, "evaluation": {"every": 6},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    rows = [{"step": 0, "kind": "validation", "k": K, "avg": 25.0, "time/evaluate": 2.0}]
    usual = {"correct": 0.3, "length": 20.0, "entropy": 0.5, "loss": 0.1, "time/rollout": 1.0,
             "time/train": 0.5, "rollouts_sampled": 8}  # fmt: skip
    for step in range(1, STEPS + 1):
        row = {k: v[step - 1] if np.ndim(v) else v for k, v in {**usual, **metrics}.items()}
        rows.append({"step": step, "kind": "step", **row})
        if step % 6 == 0:
            rows.append({"step": step, "kind": "validation", "k": K, "avg": 50.0,
                         "time/evaluate": 2.0})  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "evaluations").mkdir()
    for name, saved in (
        ("validation_000000", evaluation([1, 1, 1, 1])),
        (f"validation_{STEPS:06d}", evaluation(list(right))),
        (f"test_{STEPS:06d}", evaluation(list(right))),
    ):
        (folder / "evaluations" / f"{name}.json").write_text(json.dumps(saved))
    (folder / "result.json").write_text("{}")
    return folder


def warned_metrics(run: Path) -> list[str]:
    return [
        warning.check.metric
        for warning in health_checks.health_warnings(group_runs([read_run(run)]))
    ]


# -- reading ---------------------------------------------------------------------------------


def test_runs_that_differ_in_their_seed_are_one_group(tmp_path):
    paths = [
        write_run(tmp_path / "my-arm" / "seed_0", seed=0),
        write_run(tmp_path / "my-arm" / "seed_1", seed=1),
        write_run(tmp_path / "other" / "my-arm" / "seed_0", lr=1.0),
    ]
    groups = group_runs([read_run(path) for path in paths])
    assert {name: [run.seed for run in runs] for name, runs in groups.items()} == {
        "my_arm": [0, 1], "my_arm (2)": [0],
    }  # fmt: skip


def test_a_line_that_is_being_written_is_not_read_yet(tmp_path):
    run = write_run(tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "ki')
    assert read_run(run).rows[-1] == {
        "step": 12, "kind": "validation", "k": 4, "avg": 50.0, "time/evaluate": 2.0,
    }  # fmt: skip


def test_a_folder_without_runs_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="neither a run nor a study"):
        read_runs(tmp_path)


# -- results of runs -------------------------------------------------------------------------


def test_arms_are_compared_problem_by_problem(tmp_path):
    a = [
        read_run(write_run(tmp_path / "a" / f"seed_{s}", seed=s, right=(0, 1, 2, 3)))
        for s in (0, 1)
    ]
    b = [
        read_run(write_run(tmp_path / "b" / f"seed_{s}", seed=s, lr=2.0, right=(1, 2, 3, 4)))
        for s in (0, 1)
    ]
    results = run_comparison.compare_runs(group_runs([*a, *b]), "two")
    assert results["split"] == "test" and results["k"] == K and results["notes"] == []
    # 0, 1, 2, 3 of 4 are right: 37.5 %; every problem gains one answer: 25 points.
    assert results["arms"]["a"]["avg"]["mean"] == pytest.approx(37.5)
    assert results["arms"]["a"]["avg"]["per_seed"] == {"0": 37.5, "1": 37.5}
    gain = results["paired"]["b-a"]["avg"]
    # Four problems without spread do not tell what others would gain.
    assert gain["mean"] == 25.0 and gain["seeds"] == 2 and gain["ci95"][0] < 0
    assert results["paired"]["b-a"]["pass"]["mean"] == pytest.approx(25.0)
    assert results["arms"]["a"]["budget"]["rollouts_sampled"] == 8 * STEPS
    assert results["arms"]["a"]["curve"] == {
        "steps": [0, 6, 12], "avg": {"0": [25.0, 50.0, 50.0], "1": [25.0, 50.0, 50.0]},
    }  # fmt: skip


def study_with_old_intervals(folder: Path, *, seeds=(0, 1)) -> Path:
    """Write a study of two arms whose results.json an earlier version has made."""
    for s in seeds:
        write_run(folder / "runs" / "a" / f"seed_{s}", seed=s, right=(0, 1, 2, 3 + s))
        write_run(folder / "runs" / "b" / f"seed_{s}", seed=s, lr=2.0, right=(1, 2, 4, 4 - s))
    old = {"mean": 0.0, "ci95": [0.0, 0.0]}
    arm = {m: {**old, "per_seed": {"0": 0.0, "1": 0.0}} for m in results_table.MEASURES}
    results = {
        "format": 1, "title": "old", "k": K, "seeds": [0, 1], "headline": [], "variants": {},
        "arms": {"a": {**arm, "budget": {"seconds": 1.0}}, "b": {**arm, "budget": {}}},
        "paired": {"b-a": dict.fromkeys(results_table.COMPARED, old)},
        "made": {"versions": {}, "seconds": 1.0},
    }  # fmt: skip
    (folder / "study.json").write_text("{}")
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def test_old_results_get_current_intervals_from_their_evaluations(tmp_path):
    folder = study_with_old_intervals(tmp_path)
    old = migrate_results(json.loads((folder / "results.json").read_text()))
    new = run_comparison.with_current_intervals(old, read_runs(folder))
    assert new["intervals"] == "student" and new["arms"]["a"]["budget"] == {"seconds": 1.0}
    assert new["arms"]["a"]["avg"]["mean"] == pytest.approx(40.625)
    gain = new["paired"]["b-a"]["avg"]
    assert gain["mean"] == pytest.approx(25.0) and gain["ci95"][0] < 25 < gain["ci95"][1]
    assert run_comparison.with_current_intervals(new, []) == new


def test_old_results_without_their_evaluations_stay_with_a_note(tmp_path):
    folder = study_with_old_intervals(tmp_path, seeds=(0,))
    old = migrate_results(json.loads((folder / "results.json").read_text()))
    new = run_comparison.with_current_intervals(old, read_runs(folder))
    assert new == {**old, "notes": [run_comparison.BOOTSTRAP_NOTE]}


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"seed": 1}, "other seeds"),
        ({"ids": "abcx"}, "other problems"),
        ({"k": 2}, "their k differs"),
    ],
)
def test_arms_that_cannot_be_paired_are_noted(tmp_path, changed, reason):
    a = write_run(tmp_path / "a")
    b = write_run(tmp_path / "b", lr=2.0, seed=changed.pop("seed", 0))
    if changed:
        saved = evaluation([1, 1, 1, 1], **changed)
        (b / "evaluations" / f"test_{STEPS:06d}.json").write_text(json.dumps(saved))
    results = run_comparison.compare_runs(group_runs([read_run(a), read_run(b)]), "")
    assert results["paired"] == {}
    (note,) = results["notes"]
    assert reason in note and note.startswith("b and a")


def test_runs_in_progress_are_left_out_where_others_are_complete(tmp_path):
    folders = [write_run(tmp_path / "a" / f"seed_{s}", seed=s, right=(0, 1, 2, 3)) for s in (0, 1)]
    folders.append(write_run(tmp_path / "b" / "seed_0", lr=2.0, right=(1, 2, 3, 4)))
    begun = write_run(tmp_path / "b" / "seed_1", seed=1, lr=2.0)
    for file in (begun / "evaluations").glob("*_000012.json"):
        file.unlink()  # it has answered the validation problems once, at step 0
    (begun / "result.json").unlink()
    runs = [read_run(folder) for folder in (*folders, begun)]
    results = run_comparison.compare_runs(group_runs(runs), "")
    assert results["split"] == "test"
    assert results["arms"]["b"]["avg"]["per_seed"] == {"0": 62.5}
    gain = results["paired"]["b-a"]["avg"]
    assert gain["mean"] == 25.0 and gain["seeds"] == 1
    assert results["notes"] == [
        "not complete, and left out: b (seed 1)",
        "b and a are compared on the seeds that both have: 0",
    ]


def test_runs_of_which_none_is_complete_are_compared_at_one_step(tmp_path):
    folders = [write_run(tmp_path / name, lr=lr) for name, lr in (("a", 1.0), ("b", 2.0))]
    for folder in folders:
        (folder / "evaluations" / f"test_{STEPS:06d}.json").unlink()
        (folder / "result.json").unlink()
    (folders[1] / "evaluations" / f"validation_{STEPS:06d}.json").unlink()
    results = run_comparison.compare_runs(group_runs([read_run(f) for f in folders]), "")
    assert results["split"] == "validation" and results["paired"]["b-a"]["avg"]["mean"] == 0
    assert results["arms"]["a"]["avg"]["mean"] == 25.0, "at step 0, as b"
    assert results["notes"] == ["no run is complete: all are compared at step 0"]


def test_training_gain_is_paired_by_problem(tmp_path):
    run = read_run(write_run(tmp_path / "run", right=(2, 2, 2, 2)))
    gain = run_comparison.training_gain([run])
    assert gain is not None
    assert (gain["first"], gain["last"], gain["steps"], gain["k"]) == (25.0, 50.0, STEPS, K)
    assert gain["difference"]["mean"] == 25.0 and gain["difference"]["seeds"] == 1


def test_one_run_has_a_claim_with_its_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr("selfteach.analysis.report.page.draw_figures", lambda *_: {})
    html, _ = render([write_run(tmp_path / "first", right=(2, 2, 2, 2), truncated=0.4)])
    text = " ".join(html.split())
    assert "first answers 50.0 % of validation samples right after step 12, 25.0 % before" in text
    assert "the data support" not in text
    assert "One seed: this run changed by so much" in text
    assert "40% of the rollouts are truncated; a warning from 20% on (step " in text


# -- health ----------------------------------------------------------------------------------


def test_a_healthy_run_has_no_warning(tmp_path):
    assert (
        warned_metrics(
            write_run(tmp_path / "run", clip_fraction=0.0, fidelity=0.6, mismatch_mean=1e-3)
        )
        == []
    )


RAMP = np.linspace(0, 1, STEPS)


@pytest.mark.parametrize(
    ("metric", "values", "text"),
    [
        ("length", 20 - 15 * RAMP, "shrank from 17 to 8 tokens"),
        ("length", 20 + 60 * RAMP, "grew from 31 to 69 tokens"),
        ("hesitations", 2 - 2 * RAMP, "fell from 1.64 to 0.36"),
        ("truncated", 0.5 * RAMP, "41% of the rollouts are truncated"),
        ("repetition", 0.2 + 0.4 * RAMP, "53% of 4-token sequences repeat, from 27%"),
        ("entropy", 0.5 * (1 - RAMP) ** 3, "entropy fell from 0.29 to 0.008"),
        ("eos_in_loss", 1 - RAMP, "only 18% of the trained rollouts train their end token"),
        ("clip_fraction", 0.5 * RAMP, "41% of the tokens are clipped"),
        ("dropped", 0.5 * RAMP, "41% of the rollouts are dropped for lack of feedback"),
        ("fidelity", 0.5 * (1 - RAMP) ** 2, "only 2% of a rollout is repeated"),
        ("mismatch_mean", 0.1 * RAMP, "0.082 nats per token between trainer and sampler"),
        ("correct", 0.6 * (1 - RAMP), "fell from 49% at their best to 11%"),
        ("loss", np.where(RAMP > 0.5, np.nan, 0.1), "not a finite number"),
    ],
)
def test_each_failure_mode_has_a_warning_with_its_numbers(tmp_path, metric, values, text):
    groups = group_runs([read_run(write_run(tmp_path / "run", **{metric: values}))])
    (warning,) = health_checks.health_warnings(groups)
    assert warning.check.metric == metric and text in warning.text, warning.text
    assert (warning.arm, warning.seed) == ("run", 0)


@pytest.mark.parametrize(
    ("metric", "values"),
    [
        ("truncated", [0.0] * 6 + [0.9] + [0.0] * 5),  # one bad batch of five: 0.18
        ("entropy", [0.04] * STEPS),  # it began there
        ("hesitations", 0.1 - 0.1 * RAMP),  # there was nothing to lose
        ("repetition", [0.4] * STEPS),  # a format that repeats by nature
        ("correct", 0.05 * (1 - RAMP)),  # never learned, so never lost
    ],
)
def test_harmless_values_have_no_warning(tmp_path, metric, values):
    assert warned_metrics(write_run(tmp_path / "run", **{metric: values})) == []


def test_every_failure_mode_of_the_paper_is_checked():
    assert {check.metric for check in health_checks.all_checks()} >= {
        "length", "hesitations", "truncated", "repetition", "entropy", "eos_in_loss", "clip_fraction",
        "dropped", "fidelity", "mismatch_mean",
    }  # fmt: skip


def test_smoothed_is_a_running_mean():
    np.testing.assert_allclose(health_checks.smoothed(np.array([1.0, 2, 3, 4]), 3), [2.0, 3.0])
    np.testing.assert_allclose(health_checks.smoothed(np.array([1.0, 3.0]), 5), [2.0])


# -- curves ----------------------------------------------------------------------------------


def test_curves_are_means_over_seeds_with_bands_from_worst_to_best(tmp_path):
    runs = [
        read_run(write_run(tmp_path / "arm" / f"seed_{s}", seed=s, length=20.0 + 10 * s))
        for s in (0, 1)
    ]
    steps, values = training_curves.over_seeds(runs, "length")
    assert steps.tolist() == list(range(5, STEPS + 1)) and values.shape == (2, STEPS - 4)
    axes = training_curves.length_and_entropy(group_runs(runs)).axes[0]
    np.testing.assert_allclose(axes.get_lines()[0].get_ydata(), 25.0)
    band = axes.collections[0].get_paths()[0].get_extents()
    assert (band.ymin, band.ymax) == (20.0, 30.0)
    assert axes.get_ylim()[0] >= 0


def test_rewards_are_drawn_where_there_are_any(tmp_path):
    plain = group_runs([read_run(write_run(tmp_path / "plain"))])
    assert training_curves.rewards(plain) is None
    values = {"reward": 1.5, "rewards/a/mean": 0.5, "rewards/$b_/mean": 2.0, "rewards/a/std": 9.0}
    rewarded = group_runs([read_run(write_run(tmp_path / "arm", **values))])
    axes = [a for a in training_curves.rewards(rewarded).axes if a.get_visible()]
    assert [a.get_ylabel() for a in axes] == ["total reward", "a", "$b_"]
    np.testing.assert_allclose([a.get_lines()[0].get_ydata()[0] for a in axes], [1.5, 0.5, 2.0])


def test_pass_at_k_is_unbiased_and_stops_before_n(tmp_path):
    run = write_run(tmp_path / "arm", right=(1, 1, 1, 1))
    axes = training_curves.pass_at_each_k(group_runs([read_run(run)])).axes[0]
    (line,) = axes.get_lines()
    # One of four right: k draws without return hold it with probability k / 4; k = 4 is left out.
    np.testing.assert_allclose(line.get_xdata(), [1, 2, 3])
    np.testing.assert_allclose(line.get_ydata(), [25.0, 50.0, 75.0])


def test_seconds_add_up_and_phases_differ_without_colour(tmp_path):
    groups = group_runs([read_run(write_run(tmp_path / "arm"))])
    bars = (
        training_curves.seconds_by_phase({"arm": run_budget.arm_budget(groups["arm"])})
        .axes[0]
        .containers
    )
    assert sum(bar.patches[0].get_width() for bar in bars) == pytest.approx(12 * 1.5 + 3 * 2)
    assert len({bar.patches[0].get_hatch() for bar in bars}) == len(bars)
    assert run_budget.run_budget(read_run(tmp_path / "arm"))["seconds"] == pytest.approx(24.0)


def test_inline_figures_share_no_ids(tmp_path):
    groups = group_runs([read_run(write_run(tmp_path / "arm"))])
    drawn = style.svg(training_curves.training(groups), "one")
    assert 'id="one-' in drawn and "url(#one-" in drawn
    assert not [part for part in drawn.split(' id="')[1:] if not part.startswith("one-")]


# -- answers ---------------------------------------------------------------------------------


def write_samples(run: Path, steps: int, answers: int) -> None:
    (run / "samples").mkdir()
    sample = {
        "problem_id": "p", "question": "q", "answer": "a </script> b", "correct": True,
        "parsed": None, "critique": None, "context": None, "dropped": None,
    }  # fmt: skip
    for step in range(1, steps + 1):
        lines = [json.dumps({**sample, "sample": i}) for i in range(answers)]
        (run / "samples" / f"step_{step:06d}.jsonl").write_text("\n".join(lines) + "\n")


def test_of_many_training_answers_whole_steps_are_left_out_evenly(tmp_path):
    a, b = write_run(tmp_path / "a"), write_run(tmp_path / "b", lr=2.0)
    write_samples(a, steps=11, answers=4)
    write_samples(b, steps=2, answers=4)
    records, total = training_answers(group_runs([read_run(a), read_run(b)]), most=24)
    assert total == 52
    taken = {(r["source"], r["step"]) for r in records}
    assert taken == {("a", 1), ("a", 6), ("a", 11), ("b", 1), ("b", 2)}
    assert len(records) == 20


def test_compressed_records_round_trip_and_cannot_end_their_element(tmp_path):
    run = write_run(tmp_path / "a")
    write_samples(run, steps=3, answers=4)
    records, _ = training_answers(group_runs([read_run(run)]))
    records[0]["text"] = "a lone surrogate \ud800, 中, </script><!--"
    compressed = compress_records(records)
    assert "<" not in compressed.index + "".join(compressed.blocks)
    back = [record for block in compressed.blocks for record in decompress(block)]
    assert back[1:] == records[1:]
    assert back[0]["text"] == "a lone surrogate ?, 中, </script><!--"
    index = decompress(compressed.index)
    assert [len(column) for column in index["columns"].values()] == [12] * len(index["columns"])
    assert index["problems"] == ["p"] and index["sources"] == ["a"]


# -- watch -----------------------------------------------------------------------------------


def write_study(folder: Path) -> None:
    folder.mkdir()
    study = {"study": {"seeds": [0, 1]}, "arms": {"grpo": {}}, "variants": {
        "easy": {"seeds": [0], "arms": None}}}  # fmt: skip
    (folder / "study.json").write_text(json.dumps({"kind": "study", "study": study}))


def test_watch_lists_runs_that_have_not_started_and_the_time_left(tmp_path):
    write_study(tmp_path / "s")
    run = write_run(tmp_path / "s" / "runs" / "grpo" / "seed_0", fidelity=0.5, dropped=0.25)
    (run / "result.json").unlink()
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join(lines[:9]) + "\n")  # up to step 7
    statuses = {
        status.name: status for status in run_statuses(tmp_path / "s", now=run.stat().st_mtime)
    }
    assert list(statuses) == ["base 0", "grpo 0", "base 1", "grpo 1", "easy base 0", "easy grpo 0"]
    assert statuses["grpo 1"].state == statuses["base 0"].state == "waiting"
    # Five steps of 1.5 s, and 2 s of evaluation for every sixth step.
    assert statuses["grpo 0"].seconds_left == pytest.approx(5 * (1.5 + 2 / 6))
    sink = io.StringIO()
    watch(tmp_path / "s", Console(file=sink, width=80), once=True)
    line = next(line for line in sink.getvalue().splitlines() if line.startswith("grpo 0"))
    assert line.split() == [
        "grpo",
        "0",
        "7/12",
        "0:09",
        "30%",
        "20",
        "0.100",
        "0.50",
        "25%",
        "50.0",
    ]
    assert max(map(len, sink.getvalue().splitlines())) <= 80


def test_a_run_that_stopped_writing_is_quiet(tmp_path):
    run = write_run(tmp_path / "run")
    (run / "result.json").unlink()
    written = (run / "metrics.jsonl").stat().st_mtime
    assert run_statuses(run, now=written + 60)[0].state == "running"
    assert run_statuses(run, now=written + 600)[0].state == "quiet"


def test_watch_ends_when_all_runs_are_complete(tmp_path):
    run = write_run(tmp_path / "run")
    (run / "result.json").unlink()
    slept = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 3:
            (run / "result.json").write_text("{}")

    console = Console(file=io.StringIO(), force_terminal=True, width=200)
    watch(run, console, every=0.5, sleep=sleep)
    assert slept == [0.5] * 3
    assert "1 of 1 runs complete" in console.file.getvalue()
