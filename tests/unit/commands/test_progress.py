"""What stands beside a progress bar."""

from __future__ import annotations

from selfteach.commands.progress import note

STEP = {"correct": 0.25, "length": 33.4, "loss": 0.1234, "dropped": 0.0, "truncated": 0.5}


def test_the_numbers_that_matter_and_troubles_only_while_there_are_any():
    rows = {"step": STEP, "validation": {"k": 4, "avg": 12.34}}
    assert note(rows) == "right 25%  length 33  loss 0.123  cut 50%  Avg@4 12.3 %"
    assert note({"step": {**STEP, "fidelity": 0.5, "dropped": 0.1}}) == (
        "right 25%  length 33  loss 0.123  fidelity 0.50  dropped 10%  cut 50%"
    )
    assert note({}) == ""
