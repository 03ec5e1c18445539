"""The script for a lent GPU keeps what it has measured, and runs to its end on a CPU."""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = ROOT / "scripts" / "gpu_report.py"


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("CUBLAS_WORKSPACE_CONFIG", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, "1")  # which the script leaves as they are
    spec = importlib.util.spec_from_file_location("gpu_report", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def options(folder: Path) -> argparse.Namespace:
    return argparse.Namespace(out=folder, device="cpu", tiny=False)


def test_a_part_that_is_stopped_keeps_its_rows(
    report: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hangs(command: list[str], *, check: bool, timeout: float) -> None:
        assert command[2:4] == ["--part", "rates"] and timeout == 3
        report.save(tmp_path, "rates", {"state": "running", "rows": [{"what": "one"}]})
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(subprocess, "run", hangs)
    report.in_process_of_its_own("rates", options(tmp_path), 3)
    result = report.load(tmp_path, "rates")
    assert result["state"].startswith("stopped after") and result["rows"] == [{"what": "one"}]
    report.write_report(tmp_path, ["rates", "parity"])
    text = (tmp_path / "report.md").read_text()
    assert "| one |" in text and "parity:  (not measured)" in text


def test_a_part_that_fails_keeps_its_rows_and_says_why(
    report: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(settings: Any) -> Any:
        """Fail after a row."""
        yield {"what": "one"}
        raise RuntimeError("no kernel image\nis available")

    parts = ModuleType("gpu_parts")
    vars(parts).update(PARTS={"rates": fails}, Settings=lambda device, tiny: None)
    monkeypatch.setitem(sys.modules, "gpu_parts", parts)
    report.measure("rates", options(tmp_path))
    result = report.load(tmp_path, "rates")
    assert result["state"] == "failed: RuntimeError: no kernel image is available"
    assert result["rows"] == [{"what": "one"}] and result["what"] == "Fail after a row."


def test_steps_are_compared_with_trls_of_the_same_kind(report: Any) -> None:
    rows = [
        {"kind": kind, "who": who, "step, s": seconds, "TRL / ours": None}
        for kind, who, seconds in (
            ("SDPO", "ours", 2.0), ("SDPO", "TRL", 3.0), ("GRPO", "ours", 1.0), ("GRPO", "TRL", None),
        )
    ]  # fmt: skip
    assert [row["TRL / ours"] for row in report.with_ratios(rows)] == [1.5, None, None, None]
    assert report.with_ratios([{"what": 1}]) == [{"what": 1}]


def test_all_parts_fit_into_the_time_together(report: Any) -> None:
    assert sum(report.LIMITS.values()) <= report.SECONDS <= 8 * 60
    names = list(report.LIMITS)
    assert names[-1].startswith("compile"), "what recipes do not use is measured last"


def test_parts_may_use_what_those_before_them_did_not_need(report: Any) -> None:
    names = list(report.LIMITS)
    total = sum(report.LIMITS.values())
    assert report.limit_of(names[0], names[1:], total) == report.LIMITS[names[0]]
    assert report.limit_of(names[1], names[2:], total - 5) == (
        report.LIMITS[names[0]] - 5 + report.LIMITS[names[1]]
    )
    assert report.limit_of(names[2], names[3:], 60) == report.LIMITS[names[2]], "the time is short"
    assert report.limit_of(names[-1], [], 7) == 7


@pytest.mark.slow
def test_it_runs_to_its_end_on_a_cpu(tmp_path: Path, report: Any) -> None:
    command = [sys.executable, str(SCRIPT), "--out", str(tmp_path), "--device", "cpu", "--tiny"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    results = {name: report.load(tmp_path, name) for name in report.LIMITS}
    assert {result["state"] for result in results.values()} == {"ended"}
    assert [row["verdict"] for row in results["resume"]["rows"]] == ["equal"]
    exact = next(r for r in results["parity"]["rows"] if r["precision"] == "float32")
    assert exact["largest difference / largest entry"] < 1e-6
    for name in ("step, full, 512", "step, LoRA, 512"):
        ours = [row for row in results[name]["rows"] if row["who"] == "ours"]
        assert [row["kind"] for row in ours] == ["SDPO", "GRPO"]
        assert [row["packed"] for row in ours] == ["false"] * 2
        assert all(row["step, s"] > 0 and row["tokens/s"] > 0 and row["MFU"] > 0 for row in ours)
    assert len(results["budget"]["rows"]) == 3
    ways = ["to the host", "mapped memory", "HTTP", "written to a folder"]
    assert [row["way"] for row in results["weights"]["rows"]] == 2 * ways
    assert "NCCL needs two GPUs" in results["weights"]["what"]
    text = (tmp_path / "report.md").read_text()
    assert all(f"**{name}: " in text for name in report.LIMITS)
    assert json.loads(text.splitlines()[2].strip("`"))["versions"]["torch"]
