"""Test the benchmarks' harness, and that their pages show the measured results."""

from __future__ import annotations

import ast
import importlib
import json
import pkgutil
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import selfteach

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"
README = (BENCHMARKS / "README.md").read_text()


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import harness

    yield harness
    sys.modules.pop("harness", None)


@pytest.fixture
def runner(harness: ModuleType) -> Iterator[Any]:
    import run

    yield run
    sys.modules.pop("run", None)


def allocating(mebibytes: int, release: bool) -> Any:
    """Return a variant that allocates a tensor of so many MiB beside an earlier one."""
    import torch

    before = torch.ones(2**22)  # 16 MiB that do not count

    def variant() -> Any:
        tensor = torch.ones(mebibytes * 2**18)
        size = tensor.sum() + before.sum()
        return size if release else tensor

    return variant


@pytest.mark.parametrize("release", [False, True])
def test_peak_memory_excludes_the_inputs(harness: Any, release: bool) -> None:
    assert 64 <= harness.peak_bytes(allocating, 64, release) / harness.MIB < 72


def fails(_: int) -> Any:
    raise ValueError("no such size")


def test_a_failing_variant_reports_its_error(
    harness: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RuntimeError, match="ValueError: no such size"):
        harness.peak_bytes(fails, 1)


def test_variants_alternate_and_warm_up_rounds_do_not_count(harness: Any) -> None:
    calls: list[str] = []
    variants = {name: lambda name=name: calls.append(name) for name in "ab"}
    timings = harness.alternated(variants, rounds=3, warm_up=2)
    assert calls == ["a", "b"] * 5
    assert [len(timings[name].seconds) for name in "ab"] == [3, 3]


def test_a_table_has_all_columns_and_blank_cells_for_what_was_not_measured(harness: Any) -> None:
    table = harness.Table("T", notes="Note.")
    table.add(a=1234567, b=None)
    table.add(a=1.23456, c="x")
    assert table.markdown() == (
        "**T**\n\n| a | b | c |\n|---|---|---|\n| 1,234,567 |  |  |\n| 1.23 |  | x |\n\nNote.\n"
    )


def test_tables_are_written_even_when_a_later_one_fails(harness: Any, tmp_path: Path) -> None:
    args = harness.parser("Doc.").parse_args(["--json", str(tmp_path / "t.json")])
    with pytest.raises(ZeroDivisionError), harness.reported(args) as tables:
        tables.append(harness.Table("First"))
        tables[0].add(value=1)
        tables[0].add(value=1 / 0)
    results = json.loads((tmp_path / "t.json").read_text())
    assert [table.rows for table in harness.tables_of(results)] == [[{"value": 1}]]
    assert results["machine"]["versions"]["torch"]


PAGES = sorted(path.name for path in (BENCHMARKS / "results").glob("*.md"))


@pytest.mark.parametrize("name", PAGES)
def test_a_page_shows_exactly_the_newest_results_of_its_machine(
    runner: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    machine = None if name == "tables.md" else Path(name).stem
    results = runner.newest(machine)
    assert results
    monkeypatch.setattr(runner, "HERE", tmp_path)
    page = (BENCHMARKS / "results" / name).read_text()
    copy = tmp_path / "results" / name
    copy.parent.mkdir()
    copy.write_text(page)
    runner.render(results, machine)
    assert copy.read_text() == page


SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", README, re.DOTALL | re.MULTILINE))
NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?(?:e-\d+)?")


@pytest.mark.parametrize("question", SECTIONS)
def test_a_question_names_its_command_and_has_one_short_table_of_measured_numbers(
    runner: Any, question: str
) -> None:
    section = SECTIONS[question]
    keys = set(re.findall(r"BENCH=(\w+)", section))
    assert keys <= set(runner.BENCHMARKS) and "`make bench" in section
    rows = [line for line in section.splitlines() if line.startswith("|")]
    assert len(rows) <= 25 and sum(row.startswith("|---") for row in rows) == (1 if keys else 0)
    pages = "\n".join((BENCHMARKS / "results" / name).read_text() for name in PAGES)
    measured = set(NUMBER.findall(pages))
    cells = [cell for row in rows[2:] for cell in row.strip("|").split("|")[1:]]
    assert {number for cell in cells for number in NUMBER.findall(cell)} <= measured


def test_every_benchmark_has_a_script(runner: Any) -> None:
    scripts = [script for _, script, _ in runner.BENCHMARKS.values()]
    assert [script for script in scripts if not (BENCHMARKS / f"{script}.py").exists()] == []
    by_hand = re.findall(r"`(\w+/\w+\.py)`", README)
    assert by_hand and [path for path in by_hand if not (BENCHMARKS / path).exists()] == []


SCRIPTS = sorted(BENCHMARKS.rglob("*.py"))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_names_that_a_benchmark_imports_from_the_package_exist(path: Path) -> None:
    """Read, not run: most need TRL, a GPU or an hour."""
    imported = [
        (str(node.module), alias.name)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == "selfteach"
        for alias in node.names
    ]
    modules = {name.name for name in pkgutil.iter_modules(selfteach.__path__, "selfteach.")}
    missing = [
        f"{module}.{name}"
        for module, name in imported
        if not hasattr(importlib.import_module(module), name) and f"{module}.{name}" not in modules
    ]
    assert missing == []


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_folders_that_a_benchmark_puts_on_its_path_exist(path: Path) -> None:
    levels = re.findall(
        r"sys\.path\.insert\(0, str\(Path\(__file__\)\.resolve\(\)\.parents\[(\d)\](.*?)\)\)",
        path.read_text(),
    )
    for level, rest in levels:
        folder = path.parents[int(level)].joinpath(*re.findall(r'"(\w+)"', rest))
        assert folder.is_dir() and (rest or (folder / "harness.py").exists())
