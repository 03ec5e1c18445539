"""After a power cut at any moment a run ends as if there had been none: what it said is on disk."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from power_cut import FlushedDisk
from safetensors.torch import load_file

from selfteach.config.recipe import Recipe
from selfteach.config.schema import validate
from selfteach.errors import CheckpointError
from selfteach.runtime.run_folder import RunFolder, load_result
from selfteach.trainer.loop import run_to_end, train

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="asks /proc which file it is")

TINY = {
    "model": {"path": "lab:two_styles"},
    "data": {"type": "lab", "train": 8, "validation": 2, "test": 2},
    "sampling": {"max_tokens": 40, "batch_size": 8},
    "critic": {"type": "oracle"},
    "context": {"type": "step_aligned"},
    "train": {
        "steps": 3, "problems_per_step": 2, "group_size": 4, "checkpoint_every": 2, "threads": 1,
    },
    "evaluation": {"every": 2, "validation_k": 1, "test_k": 1},
}  # fmt: skip


def recipe() -> Recipe:
    return validate(Recipe, TINY, where="test")


def rows_of(folder: Path) -> list[dict]:
    clocks = ("time/", "active_", "waiting", "overlap")
    rows = RunFolder(folder).metrics()
    return [{k: v for k, v in row.items() if not k.startswith(clocks)} for row in rows]


def end_of(folder: Path) -> tuple[object, ...]:
    result = load_result(folder)
    result["budget"].pop("seconds")
    return result, rows_of(folder)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    run_to_end(recipe(), folder)
    return folder


def same_end(folder: Path, whole: Path) -> None:
    assert end_of(folder) == end_of(whole)
    ours, theirs = (load_file(f / "model" / "model.safetensors") for f in (folder, whole))
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_a_row_or_a_result_that_was_seen_is_on_disk(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, cuts = tmp_path / "disk", list[Path]()
    root.mkdir()
    with FlushedDisk(root).recording(monkeypatch) as disk:
        for number, row in enumerate(train(recipe(), root / "run")):
            cuts.append(tmp_path / f"cut_{number}")
            disk.replay(cuts[-1])
            saved = RunFolder(cuts[-1] / "run").metrics()
            assert saved[-1] == row, "the row was yielded"
            if row["kind"] == "step":
                step = f"step_{row['step']:06d}"
                for name in ("rollouts", "critiques", "samples"):
                    files = list((cuts[-1] / "run" / name).glob(f"{step}*.jsonl"))
                    assert files and all(path.read_bytes() for path in files), (name, step)
        disk.replay(tmp_path / "end")
    assert len(cuts) == 6
    same_end(tmp_path / "end" / "run", whole)
    for cut in cuts[1::2]:
        run_to_end(recipe(), cut / "run")
        same_end(cut / "run", whole)


@pytest.mark.slow
def test_after_a_cut_between_any_two_flushes_a_run_ends_the_same(
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, object], None],
) -> None:
    """Every moment at which the disk differs, one after another; counted in docs/reliability.md."""
    root = tmp_path / "disk"
    root.mkdir()
    disk, cuts = FlushedDisk(root), list[Path]()
    flushed = disk.flushed

    def cut(handle: int) -> None:
        flushed(handle)
        cuts.append(tmp_path / f"cut_{disk.flushes}")
        disk.replay(cuts[-1])

    disk.flushed = cut  # type: ignore[method-assign]
    with disk.recording(monkeypatch):
        run_to_end(recipe(), root / "run")
    for folder in cuts:
        run_to_end(recipe(), folder / "run")
        same_end(folder / "run", whole)
    record_property("cuts", len(cuts))


def test_metrics_that_an_earlier_version_lost_are_noticed(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run = train(recipe(), folder)
    for row in run:
        if row["step"] == 3:
            break
    run.close()
    (folder / "metrics.jsonl").write_bytes(b"")
    state = folder / "checkpoints" / "step_000002" / "state.json"
    state.write_text('{"step": 2, "version": 2}')  # no checksums
    with pytest.raises(CheckpointError, match="lacks the rows of 2 steps"):
        run_to_end(recipe(), folder)
    assert (folder / "checkpoints" / "step_000002").exists()
