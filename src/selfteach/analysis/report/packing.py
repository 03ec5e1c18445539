"""Records inside a page: an index to filter by, and blocks that are unpacked when they are asked for.

Everything is gzip in base64, whose alphabet holds no ``<``: whatever a record says, it cannot end the
element that it lies in.
"""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from selfteach.analysis.report.answer_records import UNIT, Record, kinds_of

BLOCK_BYTES = 200_000
"""JSON in a block before it is packed: milliseconds to unpack, large enough to compress well."""
FULL_COLOUR = 4.0
"""Nats per token at which a token's colour is at its strongest."""
STRONGEST = 0.55
"""Opacity of the strongest colour: text on it stays readable in light and dark."""
EXCERPT = 90
"""Characters of a question in the list."""


@dataclass(frozen=True, slots=True)
class Packed:
    """What goes into the page."""

    index: str
    blocks: list[str]
    count: int


def pack(records: Sequence[Record]) -> Packed:
    """Index and blocks of records; the same records, the same text."""
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
    return Packed(
        packed(_json(_index(records, places, kinds))),
        [packed(f"[{','.join(block)}]") for block in blocks],
        len(records),
    )


def packed(text: str) -> str:
    """gzip in base64, without a time stamp. A lone surrogate becomes a question mark."""
    raw = text.encode("utf-8", errors="replace")
    return base64.b64encode(gzip.compress(raw, 9, mtime=0)).decode("ascii")


def unpacked(text: str) -> Any:
    """What `packed` was given, from JSON."""
    return json.loads(gzip.decompress(base64.b64decode(text)))


def _index(
    records: Sequence[Record], places: Sequence[tuple[int, int]], kinds: Sequence[str]
) -> dict[str, Any]:
    """Columns over records; names that repeat stand in lists of their own and are pointed at."""
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
    """A name's number, in order of appearance."""
    return names.setdefault(name, len(names))


def _reason(record: Record) -> str | None:
    """Why an answer taught nothing, under the first context that has a reason."""
    told = [own["dropped"] for own in record["contexts"].values() if own["dropped"]]
    return told[0] if told else (record["critique"] or {}).get("reason")


def _with_kind_numbers(record: Record, kinds: Sequence[str]) -> Record:
    tokens = record["tokens"]
    if not tokens or not tokens["kind"]:
        return record
    numbers = {name: i for i, name in enumerate(kinds)}
    return {**record, "tokens": {**tokens, "kind": [numbers[k] for k in tokens["kind"]]}}


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
