"""The note beside a progress bar."""

from __future__ import annotations

import io

from rich.console import Console

from selfteach.commands.progress import Bars, note

STEP = {"correct": 0.25, "length": 33.4, "loss": 0.1234, "dropped": 0.0, "truncated": 0.5}


def test_the_note_shows_main_metrics_and_failures_only_above_zero():
    rows = {"step": STEP, "validation": {"k": 4, "avg": 12.34}}
    assert note(rows) == "correct 25%  length 33  loss 0.123  truncated 50%  Avg@4 12.3 %"
    assert note({"step": {**STEP, "fidelity": 0.5, "dropped": 0.1}}) == (
        "correct 25%  length 33  loss 0.123  fidelity 0.50  dropped 10%  truncated 50%"
    )
    assert note({}) == ""


def test_a_log_file_gets_a_line_now_and_then() -> None:
    text, times = io.StringIO(), iter(range(0, 10_000, 10))
    bars = Bars("", console=Console(file=text), disable=True, get_time=lambda: float(next(times)))
    first = bars.add_task("selecting  ", total=2_000, note="selected 3")
    second = bars.add_task("an arm", total=10, note="")
    for done in range(1, 9):
        bars.update(second, completed=done)
        bars.update(first, completed=100 * done)
    lines = text.getvalue().splitlines()
    assert 1 < len(lines) < 8
    assert all(line.startswith("selecting: ") and line.endswith("  selected 3") for line in lines)
    assert " of 2,000, 0:" in lines[-1] and lines[-1].count("elapsed") == 1


def test_a_terminal_gets_bars_and_no_lines() -> None:
    text, times = io.StringIO(), iter(range(0, 10_000, 40))
    console = Console(file=text, force_terminal=True)
    bars = Bars("", console=console, get_time=lambda: float(next(times)))
    task = bars.add_task("selecting", total=20, note="")
    for done in range(1, 9):
        bars.update(task, completed=done)
    assert text.getvalue() == ""
