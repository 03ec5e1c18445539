"""Test that problems are read from files as people have them, of pandas, Arrow and datasets."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import datasets
import pandas as pd
import polars
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import feather, parquet

from selfteach.config.data_section import FilesData, HubData
from selfteach.errors import DataError, SelfteachError
from selfteach.tasks.sources.load import read_file
from selfteach.tasks.task import Task, load_task
from selfteach.types import Problem

ROWS = [
    {"question": 'What is "1" + 1?\nSay it, please', "answer": "007", "reference": "one\u2028two"},
    {"question": "Was ist 2 + 2, größer?", "answer": "1.50", "reference": "x;y\tz"},
    {"question": "東京\u0085?", "answer": "3", "reference": ""},
]
EXPECTED = [(row["question"], row["answer"], row["reference"] or None) for row in ROWS]
FRAME, TABLE = pd.DataFrame(ROWS), pa.Table.from_pylist(ROWS)


def files(**recipe: object) -> Task:
    return load_task(FilesData.model_validate({"type": "files", **recipe}), "")


def contents(problems: tuple[Problem, ...]) -> list[tuple[str, str, str | None]]:
    return [(p.question, p.answer, p.references.get("reference")) for p in problems]


def write_lines(path: Path, *, newline: str = "\n", encoding: str = "utf-8") -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + newline for row in ROWS)
    path.write_bytes(text.encode(encoding))


def write_stream(path: Path) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, TABLE.schema) as writer:
        writer.write_table(TABLE)


def write_ipc_file(path: Path) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, TABLE.schema) as writer:
        writer.write_table(TABLE, max_chunksize=2)


WRITERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "JSON lines": ("a.jsonl", write_lines),
    "with a byte order mark": ("a.jsonl", lambda p: write_lines(p, encoding="utf-8-sig")),
    "with CRLF": ("a.jsonl", lambda p: write_lines(p, newline="\r\n")),
    "in UTF-16": ("a.jsonl", lambda p: write_lines(p, encoding="utf-16")),
    "as .ndjson": ("a.ndjson", write_lines),
    "JSON lines as .json": ("a.json", write_lines),
    "compressed lines": ("a.jsonl.gz", lambda p: FRAME.to_json(p, orient="records", lines=True)),
    "pandas' lines": ("a.jsonl", lambda p: FRAME.to_json(p, orient="records", lines=True)),
    "pandas' records": ("a.json", lambda p: FRAME.to_json(p, orient="records")),
    "pandas' columns": ("a.json", lambda p: FRAME.to_json(p)),
    "a list in a table": ("a.json", lambda p: p.write_text(json.dumps({"v": 1, "data": ROWS}))),
    "columns as lists": ("a.json", lambda p: p.write_text(json.dumps(FRAME.to_dict("list")))),
    "a list with a byte order mark": (
        "a.json",
        lambda p: p.write_text(json.dumps(ROWS), encoding="utf-8-sig"),
    ),
    "CSV": ("a.csv", lambda p: FRAME.to_csv(p, index=False)),
    "CSV with an index": ("a.csv", lambda p: FRAME.to_csv(p)),
    "CSV with semicolons": ("a.csv", lambda p: FRAME.to_csv(p, index=False, sep=";")),
    "CSV with a byte order mark": ("a.csv", lambda p: FRAME.to_csv(p, encoding="utf-8-sig")),
    "CSV with CRLF": ("a.csv", lambda p: FRAME.to_csv(p, index=False, lineterminator="\r\n")),
    "CSV of polars": ("a.csv", lambda p: polars.DataFrame(ROWS).write_csv(p)),
    "compressed CSV": ("a.csv.gz", lambda p: FRAME.to_csv(p, index=False)),
    "TSV": ("a.tsv", lambda p: FRAME.to_csv(p, index=False, sep="\t")),
    "Parquet": ("a.parquet", lambda p: parquet.write_table(TABLE, p)),
    "pandas' Parquet": ("a.parquet", lambda p: FRAME.to_parquet(p)),
    "polars' Parquet": ("a.parquet", lambda p: polars.DataFrame(ROWS).write_parquet(p)),
    "an Arrow file": ("a.arrow", write_ipc_file),
    "an Arrow stream": ("a.arrow", write_stream),
    "Feather": ("a.feather", lambda p: feather.write_feather(TABLE, str(p))),
    "polars' IPC": ("a.ipc", lambda p: polars.DataFrame(ROWS).write_ipc(p, compression="zstd")),
    "save_to_disk": ("saved", lambda p: datasets.Dataset.from_list(ROWS).save_to_disk(p)),
    "save_to_disk in shards": (
        "saved",
        lambda p: datasets.Dataset.from_list(ROWS).save_to_disk(p, num_shards=3),
    ),
    "datasets' lines": ("a.json", lambda p: datasets.Dataset.from_list(ROWS).to_json(p)),
    "datasets' CSV": ("a.csv", lambda p: datasets.Dataset.from_list(ROWS).to_csv(p)),
}


@pytest.fixture(autouse=True)
def _quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


@pytest.mark.parametrize("name", WRITERS)
def test_a_format_gives_the_same_problems_as_every_other(name: str, tmp_path: Path) -> None:
    file, write = WRITERS[name]
    write(tmp_path / file)
    assert contents(files(train=str(tmp_path / file)).train) == EXPECTED
    assert contents(read_file(tmp_path / file)) == EXPECTED, "also for evaluate --problems"


TEXT = st.text(
    st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=20
).filter(lambda text: text.strip() == text and text.casefold() not in ("nan", "<na>", "nat"))


@given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4))
@settings(max_examples=60, deadline=None)
def test_any_text_survives_csv_and_json_lines(
    tmp_path_factory: pytest.TempPathFactory, pairs: list[tuple[str, str]]
) -> None:
    folder = tmp_path_factory.mktemp("texts")
    rows = [{"question": question, "answer": answer} for question, answer in pairs]
    frame = pd.DataFrame(rows)
    frame.to_csv(folder / "a.csv", index=False, quoting=1, lineterminator="\n")
    frame.to_json(folder / "b.jsonl", orient="records", lines=True, force_ascii=False)
    for name in ("a.csv", "b.jsonl"):
        problems = read_file(folder / name)
        assert [(p.question, p.answer) for p in problems] == pairs, name


def test_a_source_reads_the_split_of_its_name_from_a_saved_dataset(tmp_path: Path) -> None:
    saved = str(tmp_path / "saved")
    splits = {"train": ROWS[:1], "validation": ROWS[1:2], "test": ROWS[2:]}
    datasets.DatasetDict(
        {name: datasets.Dataset.from_list(rows) for name, rows in splits.items()}
    ).save_to_disk(saved)
    task = files(train=saved, validation=saved, test=saved)
    assert contents(task.train) == EXPECTED[:1]
    assert contents(task.validation) == EXPECTED[1:2]
    assert contents(task.test) == EXPECTED[2:]
    pool = files(pool=[f"{saved}/train", f"{saved}/test"], split={"validation": 0, "test": 0})
    assert len(pool.train) == 2
    with pytest.raises(DataError, match="no split 'pool'; it has 'train', 'validation', 'test'"):
        files(pool=saved)


def test_a_streamed_dataset_stops_at_its_limit_and_a_failure_is_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "hub"
    folder.mkdir()
    FRAME.to_json(folder / "train.jsonl", orient="records", lines=True)

    def hub(**recipe: object) -> Task:
        values = {"type": "hub", "path": str(folder), "train": "train", "streaming": True}
        return load_task(HubData.model_validate({**values, **recipe}), "")

    assert contents(hub(limit=2).train) == EXPECTED[:2]
    with (folder / "train.jsonl").open("a") as file:
        file.write('{"question": "broken\n' * 3)
    with pytest.raises(DataError) as caught:
        hub()
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_a_damaged_saved_dataset_is_one_line_through_files_and_hub(tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    datasets.Dataset.from_list(ROWS).save_to_disk(saved)
    next(saved.glob("*.arrow")).write_bytes(b"not Arrow")
    for load in (
        lambda: files(train=str(saved)),
        lambda: load_task(HubData(type="hub", path=str(saved), train="train"), ""),
    ):
        with pytest.raises(DataError) as caught:
            load()
        assert str(saved) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"question,answer\na,b,c\n", "a.csv:2: 3 cells, the header has 2"),
        ("a.csv", b"question,answer\na\n", "a.csv:2: 1 cells, the header has 2"),
        ("a.csv", b'question,answer\na,"b\n', "not valid CSV: unexpected end of data"),
        ("a.csv", b"question,question\na,b\n", "two columns have the same name 'question'"),
        ("a.csv", b"question,answer\n", "the problem set is empty"),
        ("a.csv", b"", "the problem set is empty"),
        ("a.csv", b"q\xe9,answer\n", "a.csv: cannot be read: 'utf-8' codec"),
        ("a.csv", b"question,answer\na,\n", "a.csv:2: the answer is empty"),
        ("a.csv", b'question,answer\n"[{""role"": oops, ""content"": 1}]",2\n',
         "a list of messages that cannot be read from CSV"),
        ("a.jsonl.gz", b"not gzip", "a.jsonl.gz: cannot be read: Not a gzipped file"),
        # Without a time, so that all workers of a parallel run collect the same test.
        (
            "a.jsonl.gz", gzip.compress(b'{"question": 1}\n' * 99, mtime=0)[:-12],
            "a.jsonl.gz: cannot be read",
        ),
        ("a.arrow", b"not Arrow at all", "a.arrow: cannot be read as Arrow"),
        ("a.arrow", b"", "a.arrow: cannot be read as Arrow"),
        ("a.json", b'{"a": 1}', "not a JSON list of problems"),
        ("a.json", b'[{"question": 1', "not valid JSON"),
        ("a.parquet.gz", b"", "a problem set is a .jsonl"),
    ],
)  # fmt: skip
def test_a_broken_file_is_one_line(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SelfteachError) as caught:
        files(train=str(tmp_path / name))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_that_is_no_dataset_names_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").touch()
    with pytest.raises(
        DataError, match="not one of save_to_disk: name the files in it; it holds a"
    ):
        files(train=str(tmp_path))
    (tmp_path / "state.json").write_text("[]")
    with pytest.raises(DataError, match=r"state\.json: cannot be read as a file of save_to_disk"):
        files(train=str(tmp_path))


def test_a_filter_with_numbers_keeps_the_rows_of_a_csv_file(tmp_path: Path) -> None:
    frame = pd.DataFrame([{"question": str(i), "answer": "x", "level": i % 3} for i in range(6)])
    frame.to_csv(tmp_path / "a.csv", index=False)
    frame.to_parquet(tmp_path / "a.parquet")
    for name in ("a.csv", "a.parquet"):
        task = files(train=str(tmp_path / name), filter={"level": [0, 2]})
        assert [p.question for p in task.train] == ["0", "2", "3", "5"], name


# -- ids ----------------------------------------------------------------------------------------


def write_numbered(path: Path, first: int, count: int, **columns: object) -> str:
    rows = [
        {"id": i + 1, "question": f"{first + i}?", "answer": "1", **columns} for i in range(count)
    ]
    pd.DataFrame(rows).to_json(path, orient="records", lines=True)
    return str(path)


def test_files_that_each_count_their_rows_do_not_clash(tmp_path: Path) -> None:
    a = write_numbered(tmp_path / "a.jsonl", 0, 3)
    b = write_numbered(tmp_path / "b.jsonl", 10, 2)
    task = files(train=[a, b])
    ids = [p.id for p in task.train]
    assert len(set(ids)) == 5 and all(id_.startswith("q_") for id_ in ids)
    assert task.counts["ids that name two problems"] == 2
    assert [p.label for p in task.train] == ["1", "2", "3", "1", "2"]
    assert {p.question: p.id for p in files(train=[b, a]).train} == {
        p.question: p.id for p in task.train
    }
    assert [p.id for p in files(train=a).train] == ["1", "2", "3"], "alone they name one each"


def test_ids_of_train_and_test_do_not_clash(tmp_path: Path) -> None:
    train = write_numbered(tmp_path / "train.jsonl", 0, 3)
    test = write_numbered(tmp_path / "test.jsonl", 10, 3)
    task = files(train=train, test=test)
    assert not {p.id for p in task.train} & {p.id for p in task.test}
    pool = files(pool=train, test=test, split={"validation": 1, "test": 0})
    assert len({p.id for s in (pool.train, pool.validation, pool.test) for p in s}) == 6


def test_a_file_that_repeats_an_id_says_what_to_name(tmp_path: Path) -> None:
    a = write_numbered(tmp_path / "a.jsonl", 0, 1)
    with Path(a).open("a") as file:
        file.write('{"id": 1, "question": "other?", "answer": "1"}\n')
    with pytest.raises(DataError, match=r"two problems have the same id '1': name a column"):
        files(train=a)
    assert len(files(train=a, columns={"id": "{question}-{id}"}).train) == 2
