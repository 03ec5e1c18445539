"""Compress records into a page: an index to filter by, and blocks that are decompressed on demand.

Everything is gzip in base64, whose alphabet has no ``<``: no text of a record can end the element
that holds it.
"""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from selfteach.analysis.report.answer_records import UNIT, AnswerRecord, kinds_of

BLOCK_BYTES = 200_000
"""JSON in a block before compression: fast to decompress, large enough to compress well."""
FULL_COLOUR = 4.0
"""Nats per token at which a token's colour is strongest."""
STRONGEST = 0.55
"""Opacity of the strongest colour: text on it stays readable in light and dark."""
EXCERPT = 90
"""Characters of a question in the list."""


@dataclass(frozen=True, slots=True)
class CompressedRecords:
    """Holds an index and blocks of records, as text for a page."""

    index: str
    blocks: list[str]
    count: int


def compress_records(records: Sequence[AnswerRecord]) -> CompressedRecords:
    """Compress records to an index and blocks; the same records give the same text."""
    kinds = kinds_of(records)
    blocks, places, block, size = [], [], list[str](), 0
    for record in records:
        text = _json(_with_kind_numbers(record, kinds))
        if block and size + len(text) > BLOCK_BYTES:
            blocks.append(block)
            block, size = [], 0
        places.append((len(blocks), len(block)))
        block.append(text)
        size += len(text)
    if block:
        blocks.append(block)
    return CompressedRecords(
        compress(_json(_index(records, places, kinds))),
        [compress(f"[{','.join(block)}]") for block in blocks],
        len(records),
    )


def compress(text: str) -> str:
    """Return gzip in base64, without a time stamp. A lone surrogate becomes a question mark."""
    raw = text.encode("utf-8", errors="replace")
    return base64.b64encode(gzip.compress(raw, 9, mtime=0)).decode("ascii")


def decompress(text: str) -> Any:
    """Return the value of JSON text that `compress` was given."""
    return json.loads(gzip.decompress(base64.b64decode(text)))


def _index(
    records: Sequence[AnswerRecord], places: Sequence[tuple[int, int]], kinds: Sequence[str]
) -> dict[str, Any]:
    """Return columns over records; repeated names are in separate lists, and columns hold indices."""
    problems, sources, reasons = dict[str, int](), dict[str, int](), dict[str, int]()
    rows = []
    for record, (block, place) in zip(records, places, strict=True):
        reason = _reason(record)
        rows.append({
            "problem": _number(problems, record["problem"]),
            "source": _number(sources, record["source"]),
            "sample": record["sample"], "step": record["step"], "correct": int(record["correct"]),
            "finished": int(record["finished"]), "case": (record["critique"] or {}).get("case"),
            "first_error": record["first_error"],
            "dropped": -1 if reason is None else _number(reasons, reason),
            "length": len(record["tokens"]["text"]) if record["tokens"] else None,
            "block": block, "place": place,
        })  # fmt: skip
    questions = {record["problem"]: record["question"] for record in reversed(records)}
    return {
        "unit": UNIT, "full_colour": FULL_COLOUR, "strongest": STRONGEST, "kinds": list(kinds),
        "problems": list(problems), "sources": list(sources), "reasons": list(reasons),
        "excerpts": [" ".join(questions[name].split())[:EXCERPT] for name in problems],
        "columns": {name: [row[name] for row in rows] for name in (rows[0] if rows else ())},
    }  # fmt: skip


def _number(names: dict[str, int], name: str) -> int:
    """Return a name's number, in order of appearance."""
    return names.setdefault(name, len(names))


def _reason(record: AnswerRecord) -> str | None:
    """Return why an answer was dropped, under the first context that has a reason."""
    contexts = record["contexts"].values()
    reasons = [context["dropped"] for context in contexts if context["dropped"]]
    return reasons[0] if reasons else (record["critique"] or {}).get("reason")


def _with_kind_numbers(record: AnswerRecord, kinds: Sequence[str]) -> AnswerRecord:
    tokens = record["tokens"]
    if not tokens or not tokens["kind"]:
        return record
    numbers = {name: i for i, name in enumerate(kinds)}
    return {**record, "tokens": {**tokens, "kind": [numbers[k] for k in tokens["kind"]]}}


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
