"""Print what a person needs to judge a critic's prompt; readable without colour."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from selfteach.analysis.critic_statistics import (
    CASES,
    FAILURES,
    QUANTILES,
    CriticSummary,
    Row,
    count_critiques,
)
from selfteach.analysis.critic_truth import CriticTruth, count_truth, share
from selfteach.analysis.terminal.sanitize import sanitized

BAR = 20
"""Width of the longest bar of a histogram."""
LONGEST = 800
"""Characters shown of a step, a question or a reply."""
STATUS_COLOURS = {"kept": "green", "fixed": "yellow", "new": "cyan", "gone": "dim", "": ""}
"""Colour of each status of a solution step: repeated; the first error, corrected; the continuation;
absent from the critique."""


def print_critiques(rows: Sequence[Row], seconds: float, console: Console, *, show: int) -> None:
    """Print a summary of critiques (rows of `commands.critique`), and up to ``show`` examples."""
    summary = count_critiques(rows)
    truth = count_truth(rows)
    for table in (
        _outcomes(summary), _agreement(summary), _against_program(truth) if truth else None,
        _fidelity(summary), _first_changes(summary), _cost(summary, seconds),
    ):  # fmt: skip
        if table is not None:
            console.print(table)
    for number, row in enumerate(examples(rows, show), start=1):
        _print_example(number, row, console)


def examples(rows: Sequence[Row], count: int) -> list[Row]:
    """Return up to ``count`` rows: one of every kind before any has two, frequent kinds first."""
    by_kind: dict[str, list[Row]] = {}
    for row in rows:
        by_kind.setdefault(_kind(row), []).append(row)
    by_size = sorted(by_kind.values(), key=len, reverse=True)
    rounds = zip_longest(*by_size)
    return [row for one in rounds for row in one if row is not None][:count]


def step_pairs(row: Row) -> Iterator[tuple[str, str, str]]:
    """Yield a rollout beside its critique: the rollout's step, its status, the critique's step.

    Statuses are those of `STATUS_COLOURS`. The final answers come last.
    """
    critique, left = row["critique"], list(row["answer_steps"])
    for step in critique["steps"]:
        if step["original"] is not None and step["original"] in left:
            left.remove(step["original"])
    for step in critique["steps"]:
        original = step["original"]
        if original is None and step["status"] == "new" and left:
            original = left.pop(0)
        yield original or "", step["status"], step["text"]
    for original in left:
        yield original, "gone", ""
    same = row["parsed"] == critique["answer"]
    status = "kept" if same else "new" if row["parsed"] is None else "fixed"
    yield row["parsed"] or "", status, critique["answer"]


def _print_example(number: int, row: Row, console: Console) -> None:
    critique, verdict = row["critique"], "correct" if row["correct"] else "incorrect"
    console.rule(
        Text(sanitized(f"{number}. {row['problem_id']}, answer {row['sample']}")), align="left"
    )
    console.print(Text(f"the rollout is {verdict}; the critic: {_describe(row)}", style="bold"))
    console.print(Text(f"question: {_short(row['question'])}"))
    table = Table(box=None, padding=(0, 1), header_style="dim", expand=True, caption=" ")
    for title, ratio in (("answer", 1), ("", None), ("critique", 1)):
        table.add_column(title, ratio=ratio, no_wrap=not title, overflow="fold")
    if "reason" in critique:
        _row(
            table,
            _short(row["answer"]),
            "",
            _short(critique.get("reply", critique.get("said")) or "(nothing)"),
        )
    else:
        for original, status, text in step_pairs(row):
            colour = STATUS_COLOURS[status]
            _row(table, _short(original), status, _short(text), style=colour)
    console.print(table)


def _describe(row: Row) -> str:
    critique = row["critique"]
    if "reason" in critique:
        return f"{critique['reason']}, {sanitized(critique['detail'])}"
    change, case = row["first_change"], critique["case"]
    step = change["step"]
    at = "nothing changed" if step is None else f"first change in step {step + 1}"
    return f"case {case} ({CASES[case]}), {at}, fidelity {change['fidelity']:.2f}"


def _kind(row: Row) -> str:
    return row["critique"].get("reason") or row["critique"]["case"]


def _outcomes(summary: CriticSummary) -> Table:
    table = _table("outcome", "rollouts", "share", "")
    for case, count in summary.cases.items():
        _row(table, f"case {case}: {CASES[case]}", f"{count:,}", _share(count, summary.rollouts))
    for reason, count in summary.failures.items():
        title = f"{reason}: {FAILURES[reason]}" if reason in FAILURES else reason
        _row(table, title, f"{count:,}", _share(count, summary.rollouts))
    _row(table, "all", f"{summary.rollouts:,}", "")
    return table


def _agreement(summary: CriticSummary) -> Table:
    wrong = summary.rollouts - summary.correct
    table = _table("against the verifier", "rollouts", "share", "of")
    solved = summary.critiques
    for title, count, of, whose in (
        ("the critic's final answer is right", solved, summary.rollouts, "all rollouts"),
        ("false alarms: a step of a correct rollout is replaced", summary.false_alarms,
         summary.correct, "correct rollouts"),
        ("correct rollouts with steps added", summary.added, summary.correct, "correct rollouts"),
        ("misses: the wrong final answer is repeated", summary.misses, wrong, "incorrect rollouts"),
    ):  # fmt: skip
        _row(table, title, f"{count:,}", _share(count, of), f"{of:,} {whose}")
    return table


def _against_program(truth: CriticTruth) -> Table:
    table = _table("against a program that checks every step", "rollouts", "share", "of")
    for title, count, of, whose in (
        ("usable critiques of rollouts with a wrong step", truth.faulty_usable, truth.faulty,
         "rollouts with a wrong step"),
        ("the first wrong step is changed first", truth.located, truth.faulty_usable,
         "of these"),
        ("a right step before it is changed", truth.early, truth.faulty_usable, "of these"),
        ("the first wrong step is repeated", truth.late, truth.faulty_usable, "of these"),
        ("usable critiques of rollouts without a wrong step", truth.sound_usable, truth.sound,
         "rollouts without a wrong step"),
        ("a step is changed all the same", truth.alarms, truth.sound_usable, "of these"),
    ):  # fmt: skip
        _row(table, title, f"{count:,}", _share_with_interval(count, of), f"{of:,} {whose}")
    return table


def _fidelity(summary: CriticSummary) -> Table:
    table = _table("fidelity: tokens before the first change", "critiques", "", "")
    if not summary.fidelity:
        _row(table, "no critique to measure", "0")
        return table
    _row(table, f"mean {summary.mean_fidelity:.2f}", f"{len(summary.fidelity):,}")
    for part in QUANTILES:
        _row(table, f"{part:.0%} have at most {summary.quantile(part):.2f}", "")
    for index, count in enumerate(summary.histogram()):
        name = f"{index / 10:.1f} to {(index + 1) / 10:.1f}"
        _row(table, f"  {name}", f"{count:,}", _bar(count, max(summary.histogram())))
    return table


def _first_changes(summary: CriticSummary) -> Table:
    table = _table("where the first change is", "critiques", "", "")
    most = max(summary.changed_at.values(), default=0)
    for step, count in summary.changed_at.items():
        name = "nowhere" if step < 0 else f"step {step + 1}"
        _row(table, f"  {name}", f"{count:,}", _bar(count, most))
    return table


def _cost(summary: CriticSummary, seconds: float) -> Table:
    table = _table("cost", "total", "per rollout", "")
    usage: Mapping[str, Any] = summary.usage
    for title, name in (
        ("requests sent", "requests"), ("replies from the cache", "cached"),
        ("prompt tokens", "prompt_tokens"), ("completion tokens", "completion_tokens"),
    ):  # fmt: skip
        each = usage[name] / max(1, summary.rollouts)
        _row(table, title, f"{usage[name]:,.0f}", f"{each:,.1f}")
    _row(table, "cost", f"{usage['cost']:,.4f}", f"{usage['cost'] / max(1, summary.rollouts):,.4f}")
    _row(table, "seconds", f"{seconds:,.1f}", f"{seconds / max(1, summary.rollouts):,.2f}")
    return table


def _table(*titles: str) -> Table:
    table = Table(box=None, padding=(0, 1), header_style="bold", caption=" ")
    for i, title in enumerate(titles):
        table.add_column(Text(title), justify="right" if i in (1, 2) else "left")
    if titles[-2:] == ("", ""):
        table.columns[2].justify = "left"  # bars
    return table


def _row(table: Table, *cells: str, style: str = "") -> None:
    """Add a row of text: never markup, and without what would act on a terminal."""
    table.add_row(*(Text(sanitized(cell)) for cell in cells), style=style)


def _bar(count: int, most: int) -> str:
    return "#" * -(-BAR * count // most) if most else ""


def _share(count: int, of: int) -> str:
    return f"{count / of:.0%}" if of else "–"


def _share_with_interval(count: int, of: int) -> str:
    interval = share(count, of)
    if interval is None:
        return "–"
    return f"{interval.mean:.0%} [{interval.low:.0%}, {interval.high:.0%}]"


def _short(text: str) -> str:
    text = sanitized(text).strip()
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}… ({len(text):,} characters)"
