"""Answers for the report's browser: from an inspection, or from what a run has saved of its samples.

A record holds all that is said of one answer, as plain JSON:

    problem, sample, source, step    which answer; ``step`` of training it was sampled at, or null
    question, gold, text, parsed, correct, finished
    spans         the text's steps as [begin, end) in characters, the final answer last
    first_error   index of the first wrong step, or null
    critique      {case, answer, steps: [{text, status}]}, or {reason, detail}, or null
    fidelity      share of the answer repeated before the critique's first change, or null
    contexts      by name: {text, dropped, advantage}; what the teacher read, or why it read nothing;
                  advantages in units of `UNIT` nats, one per token, or null
    tokens        {text, step, kind, logp} with one entry per token, or null; logp is the student's, in
                  `UNIT` nats, kind an index into ``kinds``

Everything is read from files; nothing is computed but what is rounded for display.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from selfteach.analysis.run_data import Groups, Run, read_rows
from selfteach.config.migrations import run_subfolder

Record = dict[str, Any]

UNIT = 1e-4
"""Nats: values are shown to four decimals; tokens.parquet holds all of them."""
MOST = 5_000
"""Answers in one report; of more, an even selection. The file stays small enough to send."""
TOKEN_COLUMNS = ("answer", "context", "text", "step", "kind", "student_logp", "advantage")


def inspected(folder: Path) -> tuple[list[Record], int]:
    """Answers of an inspection with the advantage of every token under every context.

    Up to `MOST` of them, evenly chosen, and how many there are.
    """
    rows = read_rows(folder / "answers.jsonl")
    scored = _scored(folder / "tokens.parquet")
    chosen = _evenly(len(rows), MOST)
    return [_inspected(rows[i], scored.get(i, {})) for i in chosen], len(rows)


def learned_from(groups: Groups, most: int = MOST) -> tuple[list[Record], int]:
    """Answers that runs have learned from, of each arm the first seed, and how many there are in all.

    Up to ``most``, the same number from each arm: whole steps are left out, evenly.
    """
    steps = {name: _sample_files(runs[0]) for name, runs in groups.items()}
    steps = {name: files for name, files in steps.items() if files}
    share = max(0, most) // max(1, len(steps))
    records, total = [], 0
    for name, files in steps.items():
        run = groups[name][0]
        first = read_rows(files[0])
        total += len(first) * len(files)
        for i in _evenly(len(files), share // max(1, len(first))):
            step = int(files[i].stem.rpartition("_")[2])
            records += [_training_sample(row, run, name, step) for row in read_rows(files[i])]
    return records, total


def _sample_files(run: Run) -> list[Path]:
    return sorted(run_subfolder(run.folder, "samples").glob("step_*.jsonl"))


def example(found: Mapping[str, Any]) -> Record:
    """The one answer of token_advantages.json, as early studies without an inspection have it."""
    tokens = found["tokens"]
    ends = np.cumsum([len(token) for token in tokens])
    starts = [t for t, step in enumerate(found["steps"]) if t == 0 or step != found["steps"][t - 1]]
    spans = [
        [int(ends[a - 1]) if a else 0, int(ends[b - 1])]
        for a, b in zip(starts, [*starts[1:], len(tokens)], strict=True)
        if found["steps"][a] >= 0
    ]
    at = found["first_error_token"]
    return {
        "problem": found["problem"], "sample": 0, "source": "one answer of the base", "step": None,
        "question": found["question"], "gold": None, "text": "".join(tokens), "parsed": None,
        "correct": found["correct"], "finished": True, "spans": spans,
        "first_error": None if at is None else found["steps"][at],
        "critique": None, "fidelity": None, "tokens": {
            "text": tokens, "step": found["steps"], "kind": None, "logp": None,
        },
        "contexts": {
            name: {"text": own["text"], "dropped": None, "advantage": _units(own["advantage"])}
            for name, own in found["contexts"].items()
        },
    }  # fmt: skip


def kinds_of(records: Iterable[Record]) -> list[str]:
    """The kinds of tokens that records name, in order of appearance; they become indices."""
    names = {k: None for r in records if r["tokens"] for k in r["tokens"]["kind"] or ()}
    return list(names)


def _inspected(row: Mapping[str, Any], scored: Mapping[str, Any]) -> Record:
    advantages = scored.get("advantage", {})
    contexts = {
        name: {"text": text, "dropped": None, "advantage": advantages.get(name)}
        for name, text in row["contexts"].items()
    }
    for name, reason in row["dropped"].items():
        contexts[name] = {"text": None, "dropped": reason, "advantage": None}
    return {
        "problem": row["problem_id"], "sample": row["sample"], "source": "inspection", "step": None,
        "question": row["question"], "gold": row["gold_answer"], "text": row["text"],
        "parsed": row["parsed"], "correct": row["correct"], "finished": row["finished"],
        "spans": row["step_spans"]["characters"], "first_error": row["first_error"],
        "critique": _critique(row["critique"]), "fidelity": row["fidelity"],
        "contexts": contexts, "tokens": scored.get("tokens"),
    }  # fmt: skip


def _training_sample(row: Mapping[str, Any], run: Run, name: str, step: int) -> Record:
    critique, change = row["critique"], row.get("first_change")
    context = run.config["context"]["type"]
    shown = {"text": row["context"], "dropped": row["dropped"], "advantage": None}
    return {
        "problem": row["problem_id"], "sample": row["sample"], "source": name, "step": step,
        "question": row["question"], "gold": row.get("gold"), "text": row["answer"],
        "parsed": row["parsed"], "correct": row["correct"], "finished": row.get("finished", True),
        "spans": row.get("steps") or [[0, len(row["answer"])]],
        "first_error": critique.get("first_error") if critique else None,
        "critique": _critique(critique), "fidelity": change["fidelity"] if change else None,
        "contexts": {} if context == "none" else {context: shown}, "tokens": None,
    }  # fmt: skip


def _critique(row: Mapping[str, Any] | None) -> Record | None:
    if row is None:
        return None
    if "reason" in row:
        return {"reason": row["reason"], "detail": row.get("detail", "")}
    steps = [{"text": step["text"], "status": step["status"]} for step in row["steps"]]
    return {"case": row["case"], "answer": row["answer"], "steps": steps}


def _scored(path: Path) -> dict[int, dict[str, Any]]:
    """Per line of answers.jsonl: its tokens, and their advantages under each context."""
    if not path.exists():
        return {}
    # A writer keeps answer, context and position in order: one stretch of rows per context.
    columns = pq.read_table(path, columns=list(TOKEN_COLUMNS)).to_pydict()
    advantage, logp = _units(columns["advantage"]), _units(columns["student_logp"])
    answers: dict[int, dict[str, Any]] = {}
    for a, b in _stretches(list(zip(columns["answer"], columns["context"], strict=True))):
        own = answers.setdefault(columns["answer"][a], {"advantage": {}})
        own["advantage"][columns["context"][a]] = advantage[a:b]
        own["tokens"] = {
            "text": columns["text"][a:b], "step": columns["step"][a:b],
            "kind": columns["kind"][a:b], "logp": logp[a:b],
        }  # fmt: skip
    return answers


def _stretches(keys: Sequence[object]) -> Iterator[tuple[int, int]]:
    """Half-open ranges over which a key stays the same."""
    starts = [i for i in range(len(keys)) if i == 0 or keys[i] != keys[i - 1]]
    yield from zip(starts, [*starts[1:], len(keys)], strict=True)


def _units(values: Any) -> list[int]:
    return np.rint(np.asarray(values, dtype=float) / UNIT).astype(int).tolist()


def _evenly(count: int, most: int) -> list[int]:
    """Up to ``most`` of ``count`` indices, evenly spread, first and last among them."""
    if count <= most:
        return list(range(count))
    if most <= 1:
        return [count - 1] * most
    return sorted({round(i) for i in np.linspace(0, count - 1, most)})
