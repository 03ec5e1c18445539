"""Damaged files are refused in one line, or the run ends as it would have."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from same_run import assert_same_end
from tiny_runs import tiny_recipe

from selfteach.analysis.report.page import write_report
from selfteach.commands.evaluate import evaluate_model
from selfteach.config.recipe import Recipe
from selfteach.config.schema import merge, validate
from selfteach.errors import CheckpointError, EngineError, SelfteachError
from selfteach.models.loading import load_model
from selfteach.models.model_path import resolve
from selfteach.runtime.run_folder import RunFolder
from selfteach.trainer.loop import run_to_end, train


def recipe(**changes: object) -> Recipe:
    return tiny_recipe(**merge({"train": {"steps": 4}}, changes))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    run_to_end(recipe(), folder)
    return folder


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run stopped after step 3, whose checkpoint is of step 2."""
    folder = tmp_path_factory.mktemp("stopped")
    run = train(recipe(), folder)
    for row in run:
        if row["step"] == 3:
            break
    run.close()
    return folder


@pytest.fixture
def run(stopped: Path, tmp_path: Path) -> Path:
    return shutil.copytree(stopped, tmp_path / "run")


def flip(path: Path, at: float, bit: int = 1) -> None:
    content = bytearray(path.read_bytes())
    content[min(int(at * len(content)), len(content) - 1)] ^= bit
    path.write_bytes(content)


def as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: dict[str, Callable[[Path], object]] = {
    "first byte": lambda path: flip(path, 0, 0x80),
    "a byte in the middle": lambda path: flip(path, 0.5, 0x80),
    "a bit in the middle": lambda path: flip(path, 0.5),
    "a bit near the end": lambda path: flip(path, 0.9, 2),
    "cut off": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "empty": lambda path: path.write_bytes(b""),
    "a list": lambda path: path.write_text("[1, 2]\n"),
    "another object": lambda path: path.write_text('{"a": [1]}\n'),
    "a number": lambda path: path.write_text("7\n"),
    "deeply nested": lambda path: path.write_text("[" * 100_000 + "\n"),
    "a folder": as_folder,
}


def names_in(folder: Path) -> list[Path]:
    """Return a run's files but those of its last steps, which are made again, and its lock."""
    files = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(path for path in files if path.name != ".lock")


def refused(work: Callable[[], object]) -> bool:
    """Return True if work raised one of our errors in one line; any other error is raised."""
    try:
        work()
    except SelfteachError as error:
        assert "\n" not in str(error), error
        return True
    return False


@pytest.mark.slow
def test_every_file_with_every_damage(
    stopped: Path, whole: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """Resume, report and evaluate; each combination is refused, or ends like the undamaged run."""
    counts = dict.fromkeys(("refused", "the same end"), 0)
    failures = []
    for name in names_in(stopped):
        for kind, damage in DAMAGES.items():
            folder = shutil.copytree(stopped, tmp_path / "run")
            damage(folder / name)
            try:
                refused(lambda: write_report(folder))  # noqa: B023
                if name.parts[0] == "checkpoints":
                    assert refused(lambda: evaluate_model(folder))  # noqa: B023
                config = RunFolder(folder).config
                if refused(lambda: run_to_end(validate(Recipe, config()), folder)):  # noqa: B023
                    counts["refused"] += 1
                else:
                    assert_same_end(folder, whole)
                    counts["the same end"] += 1
            except Exception as error:
                failures.append(f"{name}, {kind}: {type(error).__name__}: {error}"[:300])
            shutil.rmtree(folder)
    assert not failures, "\n".join(failures)
    assert min(counts.values()) > 0, counts
    record_property("damaged files", str(counts))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (".identity", "first byte"),
        (".identity", "a byte in the middle"),
        (".identity", "a folder"),
        ("checksums.jsonl", "deeply nested"),
    ],
)
def test_damage_that_once_gave_a_traceback(
    stopped: Path, whole: Path, tmp_path: Path, name: str, kind: str
) -> None:
    folder = shutil.copytree(stopped, tmp_path / "run")
    DAMAGES[kind](folder / name)
    config = validate(Recipe, RunFolder(folder).config())
    if not refused(lambda: run_to_end(config, folder)):
        assert_same_end(folder, whole)


STATE = "checkpoints/step_000002/state.json"
REFUSED = {
    ("metrics.jsonl", "first byte"): "line 1 is damaged",
    ("metrics.jsonl", "a bit in the middle"): "metrics.jsonl",
    (STATE, "a bit near the end"): "state.json is damaged",
    (STATE, "a number"): "state.json is damaged",
    (STATE, "a folder"): "state.json cannot be read",
    ("checkpoints/step_000002/weights.safetensors", "a bit in the middle"): "its checksum differs",
    ("checkpoints/step_000002/optimizer.safetensors", "a bit near the end"): "its checksum differs",
    ("checkpoints/step_000002/optimizer.safetensors", "empty"): "its checksum differs",
    ("rollouts/step_000003.000.jsonl", "a bit in the middle"): "its checksum is not the one",
    ("rollouts/step_000003.000.jsonl", "a folder"): "cannot be read",
    ("critiques/step_000003.000.jsonl", "a bit in the middle"): "its checksum is not the one",
    ("config.json", "first byte"): "config.json is damaged",
    ("problems.json", "another object"): "problems.json is damaged",
}


@pytest.mark.parametrize(("name", "kind"), REFUSED)
def test_a_damaged_file_is_refused_and_nothing_is_deleted(run: Path, name: str, kind: str) -> None:
    DAMAGES[kind](run / name)
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    with pytest.raises(CheckpointError, match=REFUSED[name, kind]) as error:
        run_to_end(validate(Recipe, RunFolder(run).config()), run)
    assert "\n" not in str(error.value)
    after = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    if name.startswith(("rollouts", "critiques")):  # read once its step is trained again
        before.pop(run / "metrics.jsonl"), after.pop(run / "metrics.jsonl")
    assert before == after


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("name", ["checkpoints", "metrics.jsonl", "rollouts", "config.json"])
def test_what_may_not_be_read_is_refused(run: Path, name: str) -> None:
    (run / name).chmod(0)
    with pytest.raises((SelfteachError, PermissionError)):
        run_to_end(recipe(), run)
    (run / name).chmod(0o755)
    run_to_end(recipe(), run)


@pytest.mark.parametrize("how", ["unreadable", "gone", "empty"])
def test_a_run_whose_checkpoints_are_gone_is_not_started_again(
    run: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    folder, iterate = run / "checkpoints", Path.iterdir

    def unreadable(path: Path) -> object:
        if path == folder:
            raise PermissionError(13, "Permission denied", str(path))
        return iterate(path)

    if how == "unreadable":
        monkeypatch.setattr(Path, "iterdir", unreadable)
    else:
        folder.rename(run.parent / "elsewhere")
        if how == "empty":
            folder.mkdir()
    before = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(CheckpointError, match=r"cannot be read|holds no checkpoint"):
        run_to_end(recipe(), run)
    assert (run / "metrics.jsonl").read_bytes() == before
    if how == "gone":  # what the line says to do
        (run / "metrics.jsonl").unlink()
        run_to_end(recipe(), run)


def test_too_few_file_handles_are_one_line(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = Path.read_bytes

    def out_of_handles(path: Path) -> bytes:
        if path.parent.name == "rollouts":
            raise OSError(24, "Too many open files", str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", out_of_handles)
    with pytest.raises(CheckpointError, match="Too many open files"):
        run_to_end(recipe(), run)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return shutil.copytree(resolve("lab:two_styles"), tmp_path / "model")


def change_weights(model: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = model / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


NAME = "model.layers.0.mlp.up_proj.weight"


def test_a_missing_weight_is_refused(model: Path) -> None:
    change_weights(model, lambda weights: weights.pop(NAME))
    with pytest.raises(EngineError, match=f"lack 1 of the model's weights, the first is {NAME}"):
        load_model(recipe(model={"path": str(model)}).model, torch.device("cpu"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused(model: Path, value: float) -> None:
    change_weights(model, lambda weights: weights[NAME][0].fill_(value))
    with pytest.raises(EngineError, match=f"{NAME} holds NaN or infinite values"):
        evaluate_model(str(model))


def test_a_checkpoint_of_nan_is_refused(run: Path) -> None:
    checkpoint = run / "checkpoints" / "step_000002"
    weights = load_file(checkpoint / "weights.safetensors")
    weights[NAME].fill_(float("nan"))
    save_file(weights, checkpoint / "weights.safetensors")
    state = json.loads((checkpoint / "state.json").read_text())
    (checkpoint / "state.json").write_text(json.dumps({k: state[k] for k in ("step", "version")}))
    with pytest.raises(CheckpointError, match=f"{NAME} holds NaN"):
        evaluate_model(run)


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_damaged_model_is_one_line(model: Path, name: str, kind: str) -> None:
    DAMAGES[kind](model / name)
    work = lambda: evaluate_model(str(model), k=1)  # noqa: E731
    if not refused(work):  # a bit of a weight, a character of the vocabulary: another model
        assert kind.startswith("a bit") or name == "model.safetensors"
