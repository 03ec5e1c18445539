"""After a power cut at any moment a run ends as if there had been none: what it said is on disk."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from power_cut import FlushedDisk
from same_run import assert_same_end
from tiny_runs import tiny_recipe

from selfteach.errors import CheckpointError
from selfteach.runtime.run_folder import RunFolder
from selfteach.trainer.loop import run_to_end, train

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="asks /proc which file it is")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    run_to_end(tiny_recipe(), folder)
    return folder


def test_a_row_or_a_result_that_was_seen_is_on_disk(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, cuts = tmp_path / "disk", list[Path]()
    root.mkdir()
    with FlushedDisk(root).recording(monkeypatch) as disk:
        for number, row in enumerate(train(tiny_recipe(), root / "run")):
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
    assert_same_end(tmp_path / "end" / "run", whole)
    for cut in cuts[1::2]:
        run_to_end(tiny_recipe(), cut / "run")
        assert_same_end(cut / "run", whole)


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
        run_to_end(tiny_recipe(), root / "run")
    for folder in cuts:
        run_to_end(tiny_recipe(), folder / "run")
        assert_same_end(folder / "run", whole)
    record_property("cuts", len(cuts))


def test_metrics_that_an_earlier_version_lost_are_noticed(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run = train(tiny_recipe(), folder)
    for row in run:
        if row["step"] == 3:
            break
    run.close()
    (folder / "metrics.jsonl").write_bytes(b"")
    state = folder / "checkpoints" / "step_000002" / "state.json"
    state.write_text('{"step": 2, "version": 2}')  # no checksums
    with pytest.raises(CheckpointError, match="lacks the rows of 2 steps"):
        run_to_end(tiny_recipe(), folder)
    assert (folder / "checkpoints" / "step_000002").exists()
