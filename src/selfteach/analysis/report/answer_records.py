"""Read answers for the report's browser, from an inspection or from a run's training samples.

A record holds everything about one answer, as plain JSON:

    problem, sample, source, step    which answer; ``step`` is the training step, or null
    question, gold, text, parsed, correct, finished
    prompt        the prompt as the student saw it, control tokens included, or null if it is not stored
    history       messages before the question: [{role, content}]
    spans         the text's solution steps as [begin, end) in characters, the final answer last
    replies       of an episode, what the environment wrote: [index of the turn before it, text]
    first_error   index of the first wrong step, or null
    critique      {case, answer, steps: [{text, status}]}, or {reason, detail}, or null
    fidelity      share of the answer repeated before the critique's first change, or null
    contexts      by name: {text, dropped, advantage}; the teacher's context, or why there is none;
                  advantages in units of `UNIT` nats, one per token, or null
    tokens        {text, step, kind, logp} with one entry per token, or null; logp is the student's, in
                  `UNIT` nats, kind an index into ``kinds``

Everything is read from files; values are only rounded for display.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from selfteach.analysis.run_data import Groups, RunData, read_rows
from selfteach.config.migrations import run_subfolder

AnswerRecord = dict[str, Any]

UNIT = 1e-4
"""Nats: values are shown to four decimals; tokens.parquet holds all digits."""
MOST = 5_000
"""Answers in one report; of more, an even selection, so that the file stays small."""
TOKEN_COLUMNS = ("answer", "context", "text", "step", "kind", "student_logp", "advantage")


def inspected_answers(folder: Path) -> tuple[list[AnswerRecord], int]:
    """Read an inspection's answers with the advantage of every token under every context.

    Returns up to `MOST` of them, evenly chosen, and how many there are.
    """
    rows = read_rows(folder / "answers.jsonl")
    tokens = _scored_tokens(folder / "tokens.parquet")
    chosen = _evenly(len(rows), MOST)
    return [_inspected_record(rows[i], tokens.get(i, {})) for i in chosen], len(rows)


def training_answers(groups: Groups, most: int = MOST) -> tuple[list[AnswerRecord], int]:
    """Read the answers that runs trained on, of each arm's first seed, and how many there are.

    Up to ``most``, the same number from each arm: whole training steps are left out, evenly.
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
            rows = read_rows(files[i])
            prompts = {row["problem_id"]: row["prompt"] for row in rows if "prompt" in row}
            records += [_training_record(row, run, name, step, prompts) for row in rows]
    return records, total


def _sample_files(run: RunData) -> list[Path]:
    return sorted(run_subfolder(run.folder, "samples").glob("step_*.jsonl"))


def example_answer(example: Mapping[str, Any]) -> AnswerRecord:
    """Return the answer of token_advantages.json, which early studies have instead of an inspection."""
    tokens = example["tokens"]
    ends = np.cumsum([len(token) for token in tokens])
    starts = [
        t for t, step in enumerate(example["steps"]) if t == 0 or step != example["steps"][t - 1]
    ]
    spans = [
        [int(ends[a - 1]) if a else 0, int(ends[b - 1])]
        for a, b in zip(starts, [*starts[1:], len(tokens)], strict=True)
        if example["steps"][a] >= 0
    ]
    at = example["first_error_token"]
    return {
        "problem": example["problem"], "sample": 0, "source": "one answer of the base", "step": None,
        "question": example["question"], "gold": None, "text": "".join(tokens), "parsed": None,
        "correct": example["correct"], "finished": True, "spans": spans, "prompt": None, "history": [],
        "first_error": None if at is None else example["steps"][at],
        "replies": [], "critique": None, "fidelity": None, "tokens": {
            "text": tokens, "step": example["steps"], "kind": None, "logp": None,
        },
        "contexts": {
            name: {"text": c["text"], "dropped": None, "advantage": _units(c["advantage"])}
            for name, c in example["contexts"].items()
        },
    }  # fmt: skip


def kinds_of(records: Iterable[AnswerRecord]) -> list[str]:
    """Return the kinds of tokens in records, in order of appearance; records point at them by index."""
    names = {k: None for r in records if r["tokens"] for k in r["tokens"]["kind"] or ()}
    return list(names)


def _inspected_record(row: Mapping[str, Any], tokens: Mapping[str, Any]) -> AnswerRecord:
    advantages = tokens.get("advantage", {})
    contexts = {
        name: {"text": text, "dropped": None, "advantage": advantages.get(name)}
        for name, text in row["contexts"].items()
    }
    for name, reason in row["dropped"].items():
        contexts[name] = {"text": None, "dropped": reason, "advantage": None}
    return {
        "problem": row["problem_id"], "sample": row["sample"], "source": "inspection", "step": None,
        "question": row["question"], "gold": row["gold_answer"], "text": row["text"],
        "prompt": row.get("prompt"), "history": row.get("history", []),
        "parsed": _final(row), "correct": row["correct"], "finished": row["finished"],
        "spans": row["step_spans"]["characters"], "first_error": row["first_error"],
        "replies": _replies(row, row["text"]),
        "critique": _critique(row["critique"]), "fidelity": row["fidelity"],
        "contexts": contexts, "tokens": tokens.get("tokens"),
    }  # fmt: skip


def _training_record(
    row: Mapping[str, Any], run: RunData, name: str, step: int, prompts: Mapping[str, str]
) -> AnswerRecord:
    """Return a record from a sample; a problem's prompt stands in its first row (`sample_rows`)."""
    critique, change = row["critique"], row.get("first_change")
    context = run.config["context"]["type"]
    shown_context = {"text": row["context"], "dropped": row["dropped"], "advantage": None}
    return {
        "problem": row["problem_id"], "sample": row["sample"], "source": name, "step": step,
        "question": row["question"], "gold": row.get("gold"), "text": row["answer"],
        "prompt": prompts.get(row["problem_id"]), "history": row.get("history", []),
        "parsed": _final(row), "correct": row["correct"], "finished": row.get("finished", True),
        "spans": row.get("steps") or [[0, len(row["answer"])]],
        "replies": _replies(row, row["answer"]),
        "first_error": critique.get("first_error") if critique else None,
        "critique": _critique(critique), "fidelity": change["fidelity"] if change else None,
        "contexts": {} if context == "none" else {context: shown_context}, "tokens": None,
    }  # fmt: skip


def _final(row: Mapping[str, Any]) -> str | None:
    """Return the answer that the last step states; None where an environment has judged the turns."""
    return None if row.get("judged") else row["parsed"]


def _replies(row: Mapping[str, Any], text: str) -> list[list[Any]]:
    """Return what an environment wrote, each with the index of the turn before it."""
    replies, turn = [], -1
    for segment in row.get("segments", ()):
        turn += segment["kind"] == "model"
        if segment["kind"] != "model":
            replies.append([turn, text[slice(*segment["span"])]])
    return replies


def _critique(row: Mapping[str, Any] | None) -> AnswerRecord | None:
    if row is None:
        return None
    if "reason" in row:
        return {"reason": row["reason"], "detail": row.get("detail", "")}
    steps = [{"text": step["text"], "status": step["status"]} for step in row["steps"]]
    return {"case": row["case"], "answer": row["answer"], "steps": steps}


def _scored_tokens(path: Path) -> dict[int, dict[str, Any]]:
    """Read tokens and their advantages under each context, by line of answers.jsonl."""
    if not path.exists():
        return {}
    # Rows are in order of answer, context and position: one range of rows per answer and context.
    columns = pq.read_table(path, columns=list(TOKEN_COLUMNS)).to_pydict()
    advantage, logp = _units(columns["advantage"]), _units(columns["student_logp"])
    answers: dict[int, dict[str, Any]] = {}
    for a, b in _equal_ranges(list(zip(columns["answer"], columns["context"], strict=True))):
        answer = answers.setdefault(columns["answer"][a], {"advantage": {}})
        answer["advantage"][columns["context"][a]] = advantage[a:b]
        answer["tokens"] = {
            "text": columns["text"][a:b], "step": columns["step"][a:b],
            "kind": columns["kind"][a:b], "logp": logp[a:b],
        }  # fmt: skip
    return answers


def _equal_ranges(keys: Sequence[object]) -> Iterator[tuple[int, int]]:
    """Yield the half-open ranges over which a key stays the same."""
    starts = [i for i in range(len(keys)) if i == 0 or keys[i] != keys[i - 1]]
    yield from zip(starts, [*starts[1:], len(keys)], strict=True)


def _units(values: Any) -> list[int]:
    return np.rint(np.asarray(values, dtype=float) / UNIT).astype(int).tolist()


def _evenly(count: int, most: int) -> list[int]:
    """Return up to ``most`` of ``count`` indices, evenly spread, first and last among them."""
    if count <= most:
        return list(range(count))
    if most <= 1:
        return [count - 1] * most
    return sorted({round(i) for i in np.linspace(0, count - 1, most)})
