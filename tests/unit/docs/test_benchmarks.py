"""The benchmarks' own tools: what they measure was done, and README.md says what was measured."""

from __future__ import annotations

import ast
import importlib
import json
import pkgutil
import sys
from pathlib import Path
from typing import Any

import pytest

import selfteach

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import harness

    yield harness
    sys.modules.pop("harness", None)


def holding(mebibytes: int, let_go: bool) -> Any:
    """Something that makes a tensor of so many MiB beside one that was there before."""
    import torch

    before = torch.ones(2**22)  # 16 MiB that do not count

    def way() -> Any:
        made = torch.ones(mebibytes * 2**18)
        size = made.sum() + before.sum()
        return size if let_go else made

    return way


@pytest.mark.parametrize("let_go", [False, True])
def test_peak_memory_is_what_was_held_at_once_beyond_the_inputs(tools: Any, let_go: bool) -> None:
    assert 64 <= tools.peak_bytes(holding, 64, let_go) / tools.MIB < 72


def fails(_: int) -> Any:
    raise ValueError("no such size")


def test_a_way_that_fails_says_why(tools: Any, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError, match="ValueError: no such size"):
        tools.peak_bytes(fails, 1)


def test_ways_take_turns_and_warm_up_rounds_do_not_count(tools: Any) -> None:
    calls: list[str] = []
    ways = {name: lambda name=name: calls.append(name) for name in "ab"}
    timings = tools.alternated(ways, rounds=3, warm_up=2)
    assert calls == ["a", "b"] * 5
    assert [len(timings[name].seconds) for name in "ab"] == [3, 3]


def test_a_table_keeps_all_columns_and_leaves_out_what_was_not_measured(tools: Any) -> None:
    table = tools.Table("T", notes="Note.")
    table.add(a=1234567, b=None)
    table.add(a=1.23456, c="x")
    assert table.markdown() == (
        "**T**\n\n| a | b | c |\n|---|---|---|\n| 1,234,567 |  |  |\n| 1.23 |  | x |\n\nNote.\n"
    )


def test_tables_are_written_down_even_when_a_later_one_fails(tools: Any, tmp_path: Path) -> None:
    args = tools.parser("Doc.").parse_args(["--json", str(tmp_path / "t.json")])
    with pytest.raises(ZeroDivisionError), tools.reported(args) as tables:
        tables.append(tools.Table("First"))
        tables[0].add(value=1)
        tables[0].add(value=1 / 0)
    said = json.loads((tmp_path / "t.json").read_text())
    assert [table.rows for table in tools.tables_of(said)] == [[{"value": 1}]]
    assert said["machine"]["versions"]["torch"]


PAGES = sorted(path.name for path in BENCHMARKS.glob("*.md"))


@pytest.mark.parametrize("name", PAGES)
def test_a_page_holds_its_machine_s_newest_results_and_nothing_else(
    tools: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    import run as runner

    machine = None if name == "README.md" else Path(name).stem
    results = runner.newest(machine)
    assert results
    monkeypatch.setattr(runner, "HERE", tmp_path)
    page = (BENCHMARKS / name).read_text()
    (tmp_path / name).write_text(page)
    runner.render(results, machine)
    sys.modules.pop("run", None)
    assert (tmp_path / name).read_text() == page


@pytest.mark.parametrize("path", sorted(BENCHMARKS.glob("*.py")), ids=lambda path: path.stem)
def test_what_a_benchmark_takes_from_the_package_is_there(path: Path) -> None:
    """Read, not run: most need TRL, a GPU or an hour."""
    taken = [
        (str(node.module), alias.name)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == "selfteach"
        for alias in node.names
    ]
    modules = {name.name for name in pkgutil.iter_modules(selfteach.__path__, "selfteach.")}
    missing = [
        f"{module}.{name}"
        for module, name in taken
        if not hasattr(importlib.import_module(module), name) and f"{module}.{name}" not in modules
    ]
    assert missing == []
