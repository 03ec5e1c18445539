"""A run from recipe to result: the same twice, the same after kill -9, nothing sampled twice."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from forked import kill_when
from safetensors.torch import load_file
from same_run import checkpoint_weights, timeless_rows

from selfteach.config.recipe import Recipe
from selfteach.config.schema import merge, validate
from selfteach.errors import CheckpointError
from selfteach.evaluation.evaluation_record import load_evaluation
from selfteach.rollout.transformers_engine import TransformersEngine
from selfteach.runtime.run_folder import RunFolder, load_result
from selfteach.trainer import checkpoint
from selfteach.trainer.loop import run_to_end, train

TINY = {
    "model": {"path": "lab:two_styles"},
    "data": {"type": "lab", "train": 12, "validation": 4, "test": 4},
    "sampling": {"max_tokens": 40, "batch_size": 8},
    "critic": {"type": "oracle"},
    "context": {"type": "step_aligned"},
    "train": {
        "steps": 5, "problems_per_step": 3, "group_size": 4,
        "checkpoint_every": 2, "threads": 1,
    },
    "evaluation": {"every": 2, "validation_k": 2, "test_k": 3},
}  # fmt: skip
ARMS = {
    "step_aligned": {},
    "ema": {"teacher": {"type": "ema", "rate": 0.2}},
    "trust_region": {"teacher": {"type": "trust_region", "student_mix": 0.3}},
    "grpo": {
        "critic": None, "context": {"type": "none"},
        "objective": {"type": "grpo", "kl_coef": 0.1}, "train": {"num_iterations": 2},
    },
    "lora": {"model": {"lora": {"rank": 4, "alpha": 8}}},
    "dropout": {
        "model": {"lora": {"rank": 4, "alpha": 8, "dropout": 0.3}},
        "train": {"num_iterations": 2, "problems_per_step": 2, "group_size": 2},
    },
}  # fmt: skip


def recipe(arm: str = "step_aligned", **changes: object) -> Recipe:
    return validate(Recipe, merge(merge(TINY, ARMS[arm]), changes), where="test")


def assert_same_run(a: Path, b: Path) -> None:
    ours, theirs = checkpoint_weights(a), checkpoint_weights(b)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name
    assert load_evaluation(a, "test", 5) == load_evaluation(b, "test", 5)
    for row, other in zip(timeless_rows(a), timeless_rows(b), strict=True):
        assert row == other


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    run_to_end(recipe(), folder)
    return folder


def test_a_run_learns_and_writes_what_it_promises(whole: Path) -> None:
    before, after = load_evaluation(whole, "validation", 0), checkpoint_weights(whole)
    assert before.k == 2 and len(before.problem_ids) == 4
    initial = load_file(Path("src/selfteach/tasks/lab/bases/two_styles/model.safetensors"))
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(after[name], initial[name])
    result = load_result(whole)
    assert result["budget"]["rollouts_sampled"] == 5 * 12
    assert result["budget"]["critiques"] == 5 * 12
    assert result["budget"]["evaluation_rollouts"] == 4 * 8 + 12
    assert result["curve"]["steps"] == [0, 2, 4, 5]
    assert all(row["mismatch_max"] < 1e-3 for row in timeless_rows(whole) if row["kind"] == "step")
    assert all(row["eos_in_loss"] > 0 for row in timeless_rows(whole) if row["kind"] == "step")
    sample = json.loads((whole / "samples" / "step_000001.jsonl").read_text().splitlines()[0])
    assert {"question", "answer", "correct", "critique", "context"} <= sample.keys()
    assert (whole / "model" / "world.json").exists()


def test_the_final_model_loads_with_plain_transformers(whole: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(whole / "model")
    AutoTokenizer.from_pretrained(whole / "model")
    trained = checkpoint_weights(whole)
    for name, param in model.named_parameters():
        assert torch.equal(param, trained[name])


def test_the_same_recipe_and_seed_twice_are_identical(whole: Path, tmp_path: Path) -> None:
    run_to_end(recipe(), tmp_path / "again")
    assert_same_run(whole, tmp_path / "again")


def test_a_run_of_an_earlier_version_is_taken_up(whole: Path, tmp_path: Path) -> None:
    """Its config.json lacks what recipes have had since: it stood at the default, so it is the same."""
    folder = shutil.copytree(whole, tmp_path / "run")
    config = json.loads((folder / "config.json").read_text())
    del config["engine"], config["train"]["staleness"], config["sampling"]["separate_copy"]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "result.json").unlink()
    run_to_end(recipe(), folder)
    assert_same_run(whole, folder)
    changed = recipe().model_dump() | {"engine": {"type": "vllm_server", "model": "m"}}
    with pytest.raises(CheckpointError, match="holds another run"):
        run_to_end(Recipe.model_validate(changed), folder)


def test_another_seed_differs(whole: Path, tmp_path: Path) -> None:
    run_to_end(recipe(seed=1), tmp_path / "other")
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(
        checkpoint_weights(whole)[name], checkpoint_weights(tmp_path / "other")[name]
    )


@pytest.mark.parametrize(
    "arm",  # dropout has adapters too
    ["ema", "trust_region", "grpo", "dropout", pytest.param("lora", marks=pytest.mark.slow)],
)
def test_stopped_and_taken_up_equals_never_stopped(arm: str, tmp_path: Path) -> None:
    run_to_end(recipe(arm), tmp_path / "whole")
    # Before the first checkpoint (at step 2), after it, and a step further on from it.
    for rows in (2, 5, 2):
        stopping = train(recipe(arm), tmp_path / "stopped")
        for _ in range(rows):
            row = next(stopping)
        stopping.close()
    assert row["step"] == 4, "it went on from step 2, not from the start"
    run_to_end(recipe(arm), tmp_path / "stopped")
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


MOMENTS = [
    "rollouts/step_000003.000.jsonl",
    pytest.param("samples/step_000004.jsonl", marks=pytest.mark.slow),
    "checkpoints/step_000002",
    "evaluations/test_000005.json",
]


@pytest.mark.parametrize("moment", MOMENTS)
def test_kill_9_and_resume(moment: str, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    kill_when((folder / moment).exists, run_to_end, recipe(), folder)
    on_disk = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.glob("rollouts/*.jsonl")}
    assert on_disk
    run_to_end(recipe(), folder)
    assert_same_run(whole, folder)
    for path, (written, content) in on_disk.items():
        assert path.stat().st_mtime_ns == written, f"{path.name} was sampled twice"
        assert path.read_bytes() == content


def test_a_checkpoint_that_was_being_deleted_does_not_stop_a_resume(
    whole: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(whole, tmp_path / "run")
    (folder / "result.json").unlink()
    half = folder / "checkpoints" / "step_000002"
    half.mkdir(exist_ok=True)
    (half / "weights.safetensors").write_bytes(b"a part of it")
    run_to_end(recipe(), folder)
    assert_same_run(whole, folder)


def test_a_folder_with_another_run_is_refused(whole: Path) -> None:
    with pytest.raises(CheckpointError, match="holds another run"):
        run_to_end(recipe(seed=7), whole)


def test_a_folder_with_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match="not empty"):
        run_to_end(recipe(), tmp_path)


def test_two_processes_never_write_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("selfteach.runtime.run_folder.LOCK_PATIENCE_S", 0.2)
    held = train(recipe(), tmp_path / "run")
    next(held)
    with pytest.raises(CheckpointError, match="another process"):
        run_to_end(recipe(), tmp_path / "run")
    held.close()


@pytest.mark.parametrize("part", ["writing", pytest.param("flushing", marks=pytest.mark.slow)])
def test_a_full_disk_is_one_line_and_loses_nothing(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    folder = tmp_path / "run"
    name = {"writing": "step_000003.jsonl.tmp", "flushing": "step_000003.jsonl"}[part]
    last = folder / "samples" / name
    write, flush = Path.write_text, os.fsync

    def writing(path: Path, *args: object, **kwargs: object) -> int:
        if path == last:
            raise OSError(28, "No space left on device")
        return write(path, *args, **kwargs)  # type: ignore[arg-type]

    def flushing(handle: int) -> None:
        if last.exists():
            raise OSError(28, "No space left on device")
        flush(handle)

    monkeypatch.setattr(Path, "write_text", writing)
    monkeypatch.setattr(os, "fsync", flushing)
    with pytest.raises(CheckpointError, match="No space left on device"):
        run_to_end(recipe(), folder)
    assert not (folder / "checkpoints" / "step_000004").exists()
    monkeypatch.setattr(Path, "write_text", write)
    monkeypatch.setattr(os, "fsync", flush)
    run_to_end(recipe(), folder)
    assert_same_run(whole, folder)


@pytest.mark.parametrize(
    "left",
    [
        "part of a line",
        *(pytest.param(x, marks=pytest.mark.slow) for x in ("nothing", "fewer lines")),
    ],
)
def test_answers_that_a_power_cut_has_cut_off_are_made_again(
    whole: Path, tmp_path: Path, left: str
) -> None:
    folder = tmp_path / "run"
    run = train(recipe(), folder)
    for row in run:
        if row["kind"] == "step" and row["step"] == 3:
            break
    run.close()
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["step_000002"]
    for path in (
        *(folder / "rollouts").glob("step_000003.*"),
        folder / "samples/step_000003.jsonl",
    ):
        text = path.read_text()
        lines = text.splitlines(keepends=True)
        path.write_text(
            {"nothing": "", "part of a line": text[:-9], "fewer lines": "".join(lines[:-2])}[left]
        )
    run_to_end(recipe(), folder)
    assert_same_run(whole, folder)


def test_what_another_run_has_answered_before_its_first_step_is_not_answered_again(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one is of another arm; both are as without each other."""
    run_to_end(recipe("grpo"), tmp_path / "grpo")
    sampled, generate = list[str](), TransformersEngine.generate

    def counted(engine, problems, sampling):
        sampled.extend(problem.id for problem in problems)
        return generate(engine, problems, sampling)

    monkeypatch.setattr(TransformersEngine, "generate", counted)
    run_to_end(recipe(), tmp_path / "run", same_start=[tmp_path / "none", tmp_path / "grpo"])
    assert_same_run(whole, tmp_path / "run")
    once = 4  # validation problems, at steps 2, 4 and 5, not at 0
    assert sum(name.startswith("validation") for name in sampled) == 3 * once


@pytest.mark.skipif(not hasattr(os, "fork"), reason="asks for a fork")
def test_a_process_that_is_forked_off_flushes_by_itself(tmp_path: Path) -> None:
    RunFolder(tmp_path).save_rollouts("parent", [])
    child = os.fork()
    if child == 0:
        run = RunFolder(tmp_path)
        run.save_rollouts("child", [])
        run.flushed()
        os._exit(7)
    for _ in range(100):
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        time.sleep(0.1)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert ended and os.waitstatus_to_exitcode(status) == 7


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc which file it is")
def test_a_checkpoint_waits_for_the_answers_it_counts_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed, flush, save = list[str](), os.fsync, checkpoint.save

    def slowly(handle: int) -> None:
        path = Path(f"/proc/self/fd/{handle}").readlink()
        if path.parent.name in ("rollouts", "samples"):
            time.sleep(0.1)
            flushed.append(path.name)
        flush(handle)

    def saving(folder: Path, step: int, *args: object, **kwargs: object) -> None:
        assert f"step_{step:06d}.001.jsonl" in flushed and f"step_{step:06d}.jsonl" in flushed
        save(folder, step, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "fsync", slowly)
    monkeypatch.setattr(checkpoint, "save", saving)
    run_to_end(recipe(train={"steps": 3}), tmp_path / "run")
    ours = {p.name for part in ("rollouts", "samples") for p in (tmp_path / "run" / part).iterdir()}
    assert set(flushed) == ours  # the last ones, too, when the run is over
