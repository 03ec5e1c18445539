"""The note beside a progress bar."""

from __future__ import annotations

from selfteach.commands.progress import note

STEP = {"correct": 0.25, "length": 33.4, "loss": 0.1234, "dropped": 0.0, "truncated": 0.5}


def test_the_note_shows_main_metrics_and_failures_only_above_zero():
    rows = {"step": STEP, "validation": {"k": 4, "avg": 12.34}}
    assert note(rows) == "correct 25%  length 33  loss 0.123  truncated 50%  Avg@4 12.3 %"
    assert note({"step": {**STEP, "fidelity": 0.5, "dropped": 0.1}}) == (
        "correct 25%  length 33  loss 0.123  fidelity 0.50  dropped 10%  truncated 50%"
    )
    assert note({}) == ""
