"""Test the archive of a study's complete runs: what it holds and what restoring changes."""

from __future__ import annotations

import json
from pathlib import Path

from script_files import load_script

SCRIPT = Path(__file__).parents[3] / "experiments" / "paper_on_a_laptop" / "parts.py"


def write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def a_study(folder: Path) -> Path:
    write(folder / "study.json", {"kind": "study"})
    for name in ("config.json", "environment.json", "metrics.jsonl"):
        write(folder / "runs/grpo/seed_0" / name, name)
        write(folder / "runs/grpo/seed_1" / name, name)
    write(folder / "runs/grpo/seed_0/result.json", {"avg": 1})
    write(folder / "runs/grpo/seed_0/evaluations/test_000008.json", [1])
    write(folder / "runs/grpo/seed_0/rollouts/step_000001.000.jsonl", [2])
    write(folder / "runs/grpo/seed_0/model/adapter.safetensors", [3])
    return folder


def test_an_archive_holds_the_records_of_complete_runs_only(tmp_path: Path) -> None:
    parts = load_script(SCRIPT)
    assert parts.save(a_study(tmp_path / "study"), tmp_path / "out" / "runs.tar.xz") == 1
    parts.restore(tmp_path / "out" / "runs.tar.xz", tmp_path / "restored")
    root = tmp_path / "restored"
    files = sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())
    run = "runs/grpo/seed_0"
    assert files == [
        f"{run}/config.json", f"{run}/environment.json", f"{run}/evaluations/test_000008.json",
        f"{run}/metrics.jsonl", f"{run}/result.json", "study.json",
    ]  # fmt: skip


def test_restoring_keeps_what_is_there(tmp_path: Path) -> None:
    parts = load_script(SCRIPT)
    study = a_study(tmp_path / "study")
    parts.save(study, tmp_path / "runs.tar.xz")
    write(study / "runs/grpo/seed_0/result.json", {"avg": 2})
    parts.restore(tmp_path / "runs.tar.xz", study)
    assert json.loads((study / "runs/grpo/seed_0/result.json").read_text()) == {"avg": 2}


def test_the_same_runs_make_the_same_archive(tmp_path: Path) -> None:
    parts = load_script(SCRIPT)
    for name in ("a", "b"):
        parts.save(a_study(tmp_path / name / "study"), tmp_path / f"{name}.tar.xz")
    assert (tmp_path / "a.tar.xz").read_bytes() == (tmp_path / "b.tar.xz").read_bytes()
