"""The report's browser of episodes: turns as steps, and between them what the environment wrote."""

from __future__ import annotations

import json
from pathlib import Path

from selfteach.analysis.report.answer_records import inspected_answers

ROW = {
    "problem_id": "p", "sample": 0, "question": "q", "gold_answer": "4", "parsed": "4",
    "text": "a call\n\n[tool result] 42\n\nIt is 42.\n\n[out of budget] none", "correct": False,
    "finished": False, "first_error": 1, "critique": None, "fidelity": None, "contexts": {},
    "dropped": {}, "step_spans": {"tokens": [], "characters": [[0, 6], [26, 35]]},
    "segments": [
        {"kind": "model", "event": None, "span": [0, 6]},
        {"kind": "environment", "event": "tool_result", "span": [8, 24]},
        {"kind": "model", "event": None, "span": [26, 35]},
        {"kind": "environment", "event": "budget", "span": [37, 57]},
    ],
}  # fmt: skip


def records(folder: Path, row: dict) -> list[dict]:
    (folder / "answers.jsonl").write_text(json.dumps(row) + "\n")
    return inspected_answers(folder)[0]


def test_replies_stand_behind_their_turns(tmp_path: Path) -> None:
    (record,) = records(tmp_path, ROW)
    assert record["replies"] == [[0, "[tool result] 42"], [1, "[out of budget] none"]]
    assert [record["text"][slice(*span)] for span in record["spans"]] == ["a call", "It is 42."]


def test_a_single_answer_has_no_replies(tmp_path: Path) -> None:
    (record,) = records(tmp_path, {k: v for k, v in ROW.items() if k != "segments"})
    assert record["replies"] == []
