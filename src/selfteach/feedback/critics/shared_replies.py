"""Exports a reply cache to a Parquet file and imports it elsewhere: a group shares what it paid for.

The file has a row per reply: the columns of `StoredReply` and a checksum of them. It does not say for
whom a reply was bought, and rows that may hold a key are left out. A file is imported as it was
written, or not at all: each row has the hash of its request as its key, its own checksum, and the
file's metadata have a checksum of all rows.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass, fields, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from selfteach.errors import CriticError
from selfteach.feedback.critics.reply_cache import ReplyCache, StoredReply
from selfteach.runtime.api_keys import MIN_REDACTED
from selfteach.runtime.atomic_files import atomic_path

FORMAT = "selfteach replies 1"
"""Written into the file's metadata; another number would be another meaning of the columns."""
ROWS = 500
"""Replies per row group, and per transaction of an import."""
SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("model", pa.string()),
        ("request", pa.string()),
        ("text", pa.string()),
        ("finished", pa.bool_()),
        ("prompt_tokens", pa.int64()),
        ("completion_tokens", pa.int64()),
        ("created", pa.float64()),
        ("refusal", pa.string()),
        ("sha256", pa.string()),
    ]
)
SECRET_VARIABLES = re.compile(r"(?:.*_)?(?:API_?KEY|KEY|TOKEN|SECRET|PASSWORD|CREDENTIALS?)", re.I)
"""Names of environment variables whose values are secrets."""
KEY_FORMS = re.compile(
    r"\b(?:sk-[\w-]{20,}|hf_\w{30,}|gh[pousr]_\w{30,}|xox[abprs]-[\w-]{20,}|AKIA[A-Z0-9]{16}"
    r"|AIza[\w-]{35})\b|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)
"""Keys of providers, by their form."""

_TYPES = {"str": str, "bool": bool, "int": int, "float": float}


@dataclass(frozen=True, slots=True)
class ExportCounts:
    """Counts the replies of an export."""

    exported: int
    models: int
    damaged: int
    """Left out: the key is not the hash of the request, or a value has another type."""
    secret: int
    """Left out: what looks like a key is in them."""


@dataclass(frozen=True, slots=True)
class ImportCounts:
    """Counts the replies of an import."""

    new: int
    same: int
    """In the cache already."""
    differing: int
    """In the cache already with another reply, which stays."""


def export_replies(cache: Path, file: Path) -> ExportCounts:
    """Write all replies of a cache to a new Parquet file.

    Raises `CriticError` if the cache is none, if it has no reply to export, or if the file exists.
    """
    _require_cache(cache)
    if file.exists():
        raise CriticError(f"{file} exists: name a new file, or delete it")
    exported, models, counts = 0, set(), {"damaged": 0, "secret": 0}
    digest, secrets = hashlib.sha256(), _secrets(os.environ)
    with (
        atomic_path(file) as temporary,
        pq.ParquetWriter(temporary, SCHEMA, compression="zstd") as out,
    ):
        for replies in _batches(ReplyCache(cache).stored()):
            clean = [_typed(reply) for reply in replies if not _left_out(reply, secrets, counts)]
            rows = [{**asdict(reply), "sha256": _checksum(reply)} for reply in clean]
            digest.update("".join(row["sha256"] for row in rows).encode())
            exported, models = exported + len(rows), models | {row["model"] for row in rows}
            out.write_table(pa.Table.from_pylist(rows, SCHEMA))
        if not exported:
            raise CriticError(f"{cache} has no reply to export")
        summary = {"format": FORMAT, "replies": str(exported), "sha256": digest.hexdigest()}
        out.add_key_value_metadata({f"selfteach.{name}": text for name, text in summary.items()})
    return ExportCounts(exported, len(models), **counts)


def import_replies(file: Path, cache: Path) -> ImportCounts:
    """Add the replies of an exported file to a cache, which is created if there is none.

    Replies of the cache stay where the file has others. Raises `CriticError` in one line, before the
    cache is changed, if the file is no export, or is damaged.
    """
    _require_whole(file)
    if cache.exists():
        _require_cache(cache)
    store, counts = ReplyCache(cache), [0, 0, 0]
    for replies in _read(file):
        added = store.add([reply for reply, _ in replies])
        counts = [count + more for count, more in zip(counts, added, strict=True)]
    return ImportCounts(*counts)


def _require_cache(path: Path) -> None:
    """Raise `CriticError` unless a file is a reply cache; nothing is written into another database."""
    if not path.is_file():
        raise CriticError(f"{path}: no such reply cache")
    try:
        with path.open("rb") as handle:
            content = handle.read(16)
    except OSError as error:
        raise CriticError(f"{path} cannot be read: {error.strerror or error}") from None
    if content != b"SQLite format 3\0" or not ReplyCache.is_one(path):
        raise CriticError(f"{path} is no reply cache: it is no SQLite file with a table of replies")


def _require_whole(file: Path) -> None:
    """Raise `CriticError` unless a file is an export, and all that was written into it is there."""
    if not file.is_file():
        raise CriticError(f"{file}: no such file")
    metadata = _metadata(file)
    if metadata.get("format") != FORMAT:
        other = metadata.get("format")
        reason = f"its format is {other!r}" if other else "it is no export of a reply cache"
        raise CriticError(
            f"{file} cannot be imported: {reason}; selfteach cache export writes them"
        )
    digest, count = hashlib.sha256(), 0
    for replies in _read(file):
        for reply, checksum in replies:
            if not _is_sound(reply) or _checksum(reply) != checksum:
                raise CriticError(
                    f"{file} is damaged: reply {count + 1} does not match its checksum"
                )
            digest.update(checksum.encode())
            count += 1
    if metadata.get("sha256") != digest.hexdigest():
        raise CriticError(
            f"{file} is damaged: {count} replies that are not the {metadata.get('replies')} exported"
        )


def _metadata(file: Path) -> Mapping[str, str]:
    with _reading(file):
        raw = pq.read_metadata(file).metadata or {}
    decoded = {
        key.decode(errors="replace"): text.decode(errors="replace") for key, text in raw.items()
    }
    prefix = "selfteach."
    return {
        key.removeprefix(prefix): text for key, text in decoded.items() if key.startswith(prefix)
    }


def _read(file: Path) -> Iterator[list[tuple[StoredReply, str]]]:
    """Yield the replies of an exported file with their checksums, some at a time."""
    with _reading(file), pq.ParquetFile(file) as table:
        if not table.schema_arrow.equals(SCHEMA):
            raise CriticError(f"{file} is damaged: it has not the columns of an export")
        for batch in table.iter_batches(batch_size=ROWS):
            rows = batch.to_pylist()
            yield [
                (StoredReply(**row), checksum) for row in rows for checksum in [row.pop("sha256")]
            ]


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Turn what Arrow raises about a file into one `CriticError`."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CriticError(f"{file} is no Parquet file, or is damaged: {reason}") from error


def _batches(replies: Iterator[StoredReply]) -> Iterator[list[StoredReply]]:
    batch: list[StoredReply] = []
    for reply in replies:
        batch.append(reply)
        if len(batch) == ROWS:
            yield batch
            batch = []
    if batch:
        yield batch


def _left_out(reply: StoredReply, secrets: Sequence[str], counts: dict[str, int]) -> bool:
    """Return True for a reply that is not exported, and count why."""
    if not _is_sound(reply):
        counts["damaged"] += 1
        return True
    text = "\n".join((reply.model, reply.request, reply.text, reply.refusal))
    holds_secret = KEY_FORMS.search(text) is not None or any(secret in text for secret in secrets)
    counts["secret"] += holds_secret
    return holds_secret


def _is_sound(reply: StoredReply) -> bool:
    """Return True if all values have their types, and the key is the hash of model and request."""
    for field in fields(StoredReply):
        value, wanted = getattr(reply, field.name), _TYPES[str(field.type)]
        number = wanted is float and isinstance(value, int)
        if not (isinstance(value, wanted) or number or (wanted is bool and value in (0, 1))):
            return False
    try:
        plain = json.dumps(
            [reply.model, json.loads(reply.request)], sort_keys=True, ensure_ascii=False
        )
    except (ValueError, RecursionError):
        return False
    return reply.key == hashlib.sha256(plain.encode(errors="surrogatepass")).hexdigest()


def _checksum(reply: StoredReply) -> str:
    return hashlib.sha256(json.dumps(astuple(reply)).encode()).hexdigest()


def _typed(reply: StoredReply) -> StoredReply:
    """Return a reply with the types of `SCHEMA`: SQLite has neither truth values nor whole floats."""
    return replace(reply, finished=bool(reply.finished), created=float(reply.created))


def _secrets(environment: Mapping[str, str]) -> list[str]:
    """Return the values of the environment that are secrets by their names."""
    return [
        value.strip()
        for name, value in environment.items()
        if SECRET_VARIABLES.fullmatch(name) and len(value.strip()) >= MIN_REDACTED
    ]
