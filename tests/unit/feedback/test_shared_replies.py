"""A reply cache exports to Parquet and imports: whole or not at all, without secrets, paid once."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from command_line import Call
from datasets import load_dataset

from selfteach.errors import CriticError
from selfteach.feedback.critics.chat_model import OnReply, Reply, Request, request_key
from selfteach.feedback.critics.reply_cache import CachedModel, ReplyCache, StoredReply, buying_for
from selfteach.feedback.critics.shared_replies import (
    ExportCounts,
    ImportCounts,
    export_replies,
    import_replies,
)

MODEL = "endpoint:m:{}"
TEXT = "reply {}\n\u2028é"


def request(number: int, words: str = "critique this") -> Request:
    return Request((("user", f"{words} \N{SLIGHTLY SMILING FACE} {number}"),), 0, 64)


def fill(path: Path, replies: dict[int, Reply], words: str = "critique this") -> Path:
    cache = ReplyCache(path)
    for number, reply in replies.items():
        about = request(number, words)
        cache.put(request_key(MODEL, about), MODEL, about, reply, "/home/me/run/step_1")
    return path


def says(text: str, **more: str) -> Reply:
    return Reply(text, True, 20, 7, **more)


@pytest.fixture(scope="module")
def stored_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of more replies than are read, written and imported at a time."""
    path = fill(tmp_path_factory.mktemp("cache") / "ours.sqlite", {0: says(TEXT.format(0))})
    rows = []
    for number in range(1, 700):
        about = request(number)
        key, written = request_key(MODEL, about), json.dumps(asdict(about))
        rows.append(StoredReply(key, MODEL, written, TEXT.format(number), True, 20, 7, 1.5e9, ""))
    assert ReplyCache(path).add(rows) == (699, 0, 0)
    return path


@pytest.fixture
def cache(stored_once: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(stored_once, tmp_path / "ours.sqlite"))


class Counting:
    """A chat model that counts the requests that reach it."""

    identity, remote = MODEL, True

    def __init__(self) -> None:
        self.requests: list[Request] = []

    def complete(self, requests: Sequence[Request], on_reply: OnReply) -> list[Reply]:
        self.requests += requests
        replies = [says("new") for _ in requests]
        for index, reply in enumerate(replies):
            on_reply(index, reply)
        return replies


def test_what_one_has_paid_for_another_reads(cache: Path, tmp_path: Path) -> None:
    file, theirs = tmp_path / "replies.parquet", tmp_path / "deep" / "theirs.sqlite"
    assert export_replies(cache, file) == ExportCounts(700, 1, 0, 0)
    assert import_replies(file, theirs) == ImportCounts(700, 0, 0)
    model = Counting()
    with buying_for("their step"):
        replies = CachedModel(model, ReplyCache(theirs)).complete([request(7), request(5000)])
    assert replies == [(says(TEXT.format(7)), True), (says("new"), False)]
    assert model.requests == [request(5000)]


def test_an_export_is_the_same_file_again_and_others_read_it(cache: Path, tmp_path: Path) -> None:
    file, again, theirs = (tmp_path / name for name in ("a.parquet", "b.parquet", "theirs.sqlite"))
    export_replies(cache, file)
    import_replies(file, theirs)
    export_replies(theirs, again)
    assert pq.read_table(file).equals(pq.read_table(again))
    rows = load_dataset(
        "parquet", data_files=str(file), split="train", cache_dir=str(tmp_path / "c")
    )
    assert len(rows) == 700 and "buyer" not in rows.column_names
    assert "/home/me" not in str(pq.read_table(file).to_pylist())


def test_replies_that_are_there_stay_and_are_counted(tmp_path: Path) -> None:
    theirs = fill(
        tmp_path / "a.sqlite", {1: says("one"), 2: says("two"), 3: says("x", refusal="no")}
    )
    ours = fill(tmp_path / "b.sqlite", {2: says("two"), 3: says("three"), 4: says("four")})
    export_replies(theirs, tmp_path / "a.parquet")
    assert import_replies(tmp_path / "a.parquet", ours) == ImportCounts(new=1, same=1, differing=1)
    store = ReplyCache(ours)
    key = request_key(MODEL, request(3))
    assert store.get(key) == says("three")
    assert import_replies(tmp_path / "a.parquet", ours) == ImportCounts(0, 2, 1)


def test_what_may_hold_a_key_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_LAB_API_KEY", "purple-elephant")
    ours = fill(tmp_path / "a.sqlite", {1: says("fine"), 2: says("it is purple-elephant")})
    fill(ours, {3: says("fine")}, "my key sk-proj-abcdefghij0123456789 is")
    counts = export_replies(ours, tmp_path / "a.parquet")
    assert counts == ExportCounts(1, 1, damaged=0, secret=2)
    content = str(pq.read_table(tmp_path / "a.parquet").to_pylist())
    assert "elephant" not in content and "sk-proj" not in content


def test_damaged_replies_are_left_out(tmp_path: Path) -> None:
    ours = fill(
        tmp_path / "a.sqlite", {1: says("one"), 2: says("two"), 3: says("three"), 4: says("4")}
    )
    keys = [request_key(MODEL, request(n)) for n in (1, 2, 3)]
    with closing(sqlite3.connect(ours)) as database, database:
        database.execute("UPDATE replies SET request = '{}' WHERE key = ?", keys[:1])
        database.execute("UPDATE replies SET prompt_tokens = 'many' WHERE key = ?", keys[1:2])
        database.execute("UPDATE replies SET text = x'00ff' WHERE key = ?", keys[2:])
    assert export_replies(ours, tmp_path / "a.parquet") == ExportCounts(1, 1, damaged=3, secret=0)


def reply_changed(path: Path) -> None:
    table = pq.read_table(path)
    texts = ["other", *table["text"].to_pylist()[1:]]
    pq.write_table(table.set_column(3, "text", pa.array(texts)), path)


def row_missing(path: Path) -> None:
    pq.write_table(pq.read_table(path).slice(1), path)


def without_metadata(path: Path) -> None:
    pq.write_table(pq.read_table(path).replace_schema_metadata(), path)


def other_format(path: Path) -> None:
    table = pq.read_table(path)
    pq.write_table(table.replace_schema_metadata({"selfteach.format": "selfteach replies 9"}), path)


def other_columns(path: Path) -> None:
    table = pq.read_table(path)
    pq.write_table(
        table.drop_columns(["sha256"]).replace_schema_metadata(table.schema.metadata), path
    )


def null_reply(path: Path) -> None:
    table = pq.read_table(path)
    texts = [None, *table["text"].to_pylist()[1:]]
    pq.write_table(table.set_column(3, "text", pa.array(texts, pa.string())), path)


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-30])


def bytes_changed(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[100:140] = bytes(40)
    path.write_bytes(content)


def text_file(path: Path) -> None:
    path.write_text("no table\n")


DAMAGE = {
    reply_changed: "does not match its checksum",
    null_reply: "does not match its checksum",
    row_missing: "699 replies that are not the 700",
    without_metadata: "it is no export of a reply cache",
    other_format: "its format is 'selfteach replies 9'",
    other_columns: "it has not the columns of an export",
    cut_off: "is no Parquet file, or is damaged",
    bytes_changed: "damaged",
    text_file: "is no Parquet file, or is damaged",
}


def with_file_metadata(change: Callable[[Path], None], path: Path) -> None:
    """Change a file, with the metadata of the file, which pyarrow's tables do not carry, kept."""
    before = {k: v for k, v in (pq.read_metadata(path).metadata or {}).items() if b"selfteach" in k}
    change(path)
    if change in (reply_changed, null_reply, row_missing, other_columns):
        table = pq.read_table(path)
        pq.write_table(table.replace_schema_metadata(before), path)


@pytest.mark.parametrize("change", DAMAGE, ids=lambda change: change.__name__)
def test_a_wrong_or_damaged_file_is_refused_before_anything_is_changed(
    cache: Path, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    file, theirs = tmp_path / "a.parquet", tmp_path / "theirs.sqlite"
    export_replies(cache, file)
    with_file_metadata(change, file)
    with pytest.raises(CriticError, match=DAMAGE[change]) as error:
        import_replies(file, theirs)
    assert "\n" not in str(error.value) and not theirs.exists()


def test_files_of_other_kinds_are_refused_in_one_line(cache: Path, tmp_path: Path) -> None:
    file, other, text = tmp_path / "a.parquet", tmp_path / "other.sqlite", tmp_path / "text.txt"
    export_replies(cache, file)
    with closing(sqlite3.connect(other)) as database:
        database.execute("CREATE TABLE people (name TEXT)")
    text.write_text("words")
    before = other.read_bytes()
    for source in (other, text, file, tmp_path / "none.sqlite", tmp_path):
        with pytest.raises(CriticError, match=r"no reply cache|no such reply cache"):
            export_replies(source, tmp_path / "new.parquet")
    for target in (other, text):
        with pytest.raises(CriticError, match="is no reply cache"):
            import_replies(file, target)
    with pytest.raises(CriticError, match="is no Parquet file"):
        import_replies(cache, file)
    with pytest.raises(CriticError, match="exists: name a new file"):
        export_replies(cache, file)
    with pytest.raises(CriticError, match="has no reply to export"):
        export_replies(fill(tmp_path / "empty.sqlite", {}), tmp_path / "new.parquet")
    assert other.read_bytes() == before and not (tmp_path / "new.parquet").exists()
    assert not list(tmp_path.glob("*.tmp"))


def test_the_command_prints_counts_and_one_line_for_a_wrong_file(
    cache: Path, tmp_path: Path, call: Call
) -> None:
    file, theirs = tmp_path / "a.parquet", tmp_path / "theirs.sqlite"
    assert call("cache", "export", cache, file) == (
        0, f"exported: 700 replies of 1 models to {file}\n", "",
    )  # fmt: skip
    status, printed, errors = call("cache", "import", file, theirs)
    assert (status, errors) == (0, "") and "imported: 700 new replies into" in printed
    status, printed, errors = call("cache", "import", cache, theirs)
    assert status == 2 and printed == "" and errors.count("\n") == 1 and "is no Parquet" in errors
