"""The note beside a progress bar."""

from __future__ import annotations

import io
import time
from functools import partial

import pytest
from rich.console import Console

from selfteach.commands import progress
from selfteach.commands.progress import Bars, note

STEP = {"correct": 0.25, "length": 33.4, "loss": 0.1234, "dropped": 0.0, "truncated": 0.5}


def test_the_note_shows_main_metrics_and_failures_only_above_zero():
    rows = {"step": STEP, "validation": {"k": 4, "avg": 12.34}}
    assert note(rows) == "correct 25%  length 33  loss 0.123  truncated 50%  Avg@4 12.3 %"
    assert note({"step": {**STEP, "fidelity": 0.5, "dropped": 0.1}}) == (
        "correct 25%  length 33  loss 0.123  fidelity 0.50  dropped 10%  truncated 50%"
    )
    assert note({}) == ""


def test_a_log_file_gets_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    text, times = io.StringIO(), iter(range(0, 10_000, 5))
    with monkeypatch.context() as patch:
        patch.setattr(progress, "Bars", partial(Bars, get_time=lambda: float(next(times))))
        bars = progress._bars(Console(file=text))
    first = bars.add_task("selecting  ", total=2_000, note="selected 3")
    second = bars.add_task("an arm", total=10, note="")
    for done in range(1, 9):
        bars.update(second, completed=done)
        bars.update(first, completed=100 * done)
    lines = text.getvalue().splitlines()
    assert 1 < len(lines) < 8
    assert all(line.startswith("selecting: ") and line.endswith("  selected 3") for line in lines)
    assert (
        " of 2,000, 0:" in lines[-1] and lines[-1].count("elapsed") == lines[-1].count("left") == 1
    )


def test_a_log_file_gets_a_line_while_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "POLL_S", 0.01)
    monkeypatch.setattr(progress, "SILENT_FOR", 0.03)
    text = io.StringIO()
    bars = progress._bars(Console(file=text))
    bars.writes_lines = False
    with bars:
        task = bars.add_task("selecting", total=None, note="")
        while text.getvalue().count("\n") < 2:
            time.sleep(0.01)
        bars.update(task, completed=3, total=60)
        while "3 of 60" not in text.getvalue():
            time.sleep(0.01)
    lines = text.getvalue()
    assert lines.startswith("selecting, 0:00:00 elapsed\n") and "selecting: 3 of 60, " in lines
    time.sleep(0.1)
    assert text.getvalue() == lines, "it ends with the bars"


def test_a_terminal_gets_bars_and_no_lines() -> None:
    text, times = io.StringIO(), iter(range(0, 10_000, 40))
    console = Console(file=text, force_terminal=True)
    bars = Bars("", console=console, get_time=lambda: float(next(times)))
    task = bars.add_task("selecting", total=20, note="")
    for done in range(1, 9):
        bars.update(task, completed=done)
    assert text.getvalue() == ""
