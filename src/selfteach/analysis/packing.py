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

from selfteach.analysis.answers import UNIT, Record, kinds_of

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
    problems, sources, reasons = _Names(), _Names(), _Names()
    contexts = _Names()
    excerpts: dict[str, str] = {}
    columns: dict[str, list[Any]] = {
        name: [] for name in ("problem", "source", "sample", "step", "correct", "finished", "case",
                              "first_error", "dropped", "length", "block", "place")
    }  # fmt: skip
    for record, (block, place) in zip(records, places, strict=True):
        critique = record["critique"] or {}
        for name in record["contexts"]:
            contexts[name]
        excerpts.setdefault(record["problem"], " ".join(record["question"].split())[:EXCERPT])
        dropped = next((c["dropped"] for c in record["contexts"].values() if c["dropped"]), None)
        dropped = dropped or critique.get("reason")
        row = {
            "problem": problems[record["problem"]], "source": sources[record["source"]],
            "sample": record["sample"], "step": record["step"], "correct": int(record["correct"]),
            "finished": int(record["finished"]), "case": critique.get("case"),
            "first_error": record["first_error"],
            "dropped": -1 if dropped is None else reasons[dropped],
            "length": len(record["tokens"]["text"]) if record["tokens"] else None,
            "block": block, "place": place,
        }  # fmt: skip
        for name, value in row.items():
            columns[name].append(value)
    return {
        "unit": UNIT, "full_colour": FULL_COLOUR, "strongest": STRONGEST, "kinds": list(kinds),
        "problems": list(problems), "excerpts": [excerpts[p] for p in problems],
        "sources": list(sources), "reasons": list(reasons), "contexts": list(contexts),
        "columns": columns,
    }  # fmt: skip


class _Names(dict[str, int]):
    """Names and their numbers, in order of appearance."""

    def __missing__(self, name: str) -> int:
        self[name] = len(self)
        return self[name]


def _with_kind_numbers(record: Record, kinds: Sequence[str]) -> Record:
    tokens = record["tokens"]
    if not tokens or not tokens["kind"]:
        return record
    numbers = {name: i for i, name in enumerate(kinds)}
    return {**record, "tokens": {**tokens, "kind": [numbers[k] for k in tokens["kind"]]}}


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
