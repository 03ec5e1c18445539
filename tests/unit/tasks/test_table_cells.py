"""Test what cells of tables become: golds and questions as people mean them, or one line."""

from __future__ import annotations

import json
import tracemalloc
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from selfteach.errors import DataError
from selfteach.tasks.sources.audit import corruptions
from selfteach.tasks.sources.load import read_file
from selfteach.tasks.sources.splits import hash_position, normalised


def gold(folder: Path, column: Any) -> str:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"question": ["q"], "answer": column}), folder / "p.parquet")
    return read_file(folder / "p.parquet")[0].answer


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.1 + 0.2, "0.3"),
        (1.1 * 3, "3.3"),
        (1 / 3, "0.3333333333333333"),
        (3.141592653589793, "3.141592653589793"),
        (0.123456789012, "0.123456789012"),
        (datetime(2024, 5, 1), "2024-05-01"),
        (datetime(2024, 5, 1, 12, 30), "2024-05-01 12:30:00"),
        ("\ufeff7", "7"),
        ("7\u200b ", "7"),
    ],
)
def test_a_cell_is_written_as_people_write_it(tmp_path: Path, value: Any, expected: str) -> None:
    assert gold(tmp_path, [value]) == expected


@pytest.mark.parametrize("value", ["\u200b", "-nan", "#N/A"])
def test_a_cell_without_content_is_refused(tmp_path: Path, value: str) -> None:
    with pytest.raises(DataError, match="the answer is"):
        gold(tmp_path, [value])


def test_narrow_floats_in_lists_and_tables_are_the_shortest_numbers(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    from selfteach.tasks.sources.rows import read_rows

    narrow = pyarrow.float32()
    table = pyarrow.table(
        {
            "list": pyarrow.array([[0.1]], pyarrow.list_(narrow)),
            "table": pyarrow.array([{"a": 0.1}], pyarrow.struct([("a", narrow)])),
        }
    )
    parquet.write_table(table, tmp_path / "p.parquet")
    (row,) = read_rows(tmp_path / "p.parquet")
    assert row.values == {"list": [0.1], "table": {"a": 0.1}}


@pytest.mark.parametrize(
    "line",
    [
        '{"question": "q", "answer": "\\ud800"}',
        '{"question": "q\\udfff", "answer": "1"}',
        '{"question": ' + "[" * 100_000 + "]" * 100_000 + "}",
    ],
    ids=["answer", "question", "deep"],
)
def test_what_no_file_can_hold_is_one_line(tmp_path: Path, line: str) -> None:
    (tmp_path / "p.jsonl").write_text(line + "\n")
    with pytest.raises(DataError, match=r"p\.jsonl:1"):
        read_file(tmp_path / "p.jsonl")


def test_a_list_that_is_too_deep_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text("[" * 100_000)
    with pytest.raises(DataError, match="not valid JSON"):
        read_file(tmp_path / "p.json")


def test_a_byte_order_mark_makes_no_difference(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text(
        json.dumps({"question": "q", "answer": "1"}), encoding="utf-8-sig"
    )
    assert read_file(tmp_path / "p.jsonl")[0].answer == "1"


@pytest.mark.parametrize("mark", ["\u200b", "\u00ad", "\u2060", "\ufeff"])
def test_a_question_with_unseen_marks_is_the_same_question(mark: str) -> None:
    assert normalised(f"ho{mark}w many?") == normalised("how many?")
    assert hash_position(f"ho{mark}w many?", 0) == hash_position("how many?", 0)


def test_corruptions_of_a_long_gold_take_little_memory() -> None:
    tracemalloc.start()
    assert len(list(corruptions("1 " * 20_000))) == 12
    assert tracemalloc.get_traced_memory()[1] < 20_000_000
    tracemalloc.stop()
