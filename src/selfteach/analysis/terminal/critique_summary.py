"""What a person needs to judge a critic's prompt, on the terminal; readable without colour."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from selfteach.analysis.critic_statistics import CASES, OUTCOMES, QUANTILES, Row, Summary, summarise
from selfteach.analysis.terminal.sanitize import plain

BAR = 20
"""Width of the longest bar of a histogram."""
LONGEST = 800
"""Characters of a step, a question or a reply that are shown."""
MARKS = {"kept": "green", "fixed": "yellow", "new": "cyan", "gone": "dim", "": ""}
"""What stands between a step and its critique, and its colour: repeated; the first error, corrected;
the continuation; not taken up."""


def print_review(rows: Sequence[Row], seconds: float, console: Console, *, show: int) -> None:
    """Print what a critic said of answers (rows of `review.review`), and up to ``show`` examples."""
    summary = summarise(rows)
    for table in (
        _outcomes(summary), _agreement(summary), _fidelity(summary), _first_changes(summary),
        _cost(summary, seconds),
    ):  # fmt: skip
        console.print(table)
    for number, row in enumerate(examples(rows, show), start=1):
        _print_pair(number, row, console)


def examples(rows: Sequence[Row], count: int) -> list[Row]:
    """Up to ``count`` rows, of every outcome one before any has two; frequent outcomes first."""
    kinds: dict[str, list[Row]] = {}
    for row in rows:
        kinds.setdefault(_kind(row), []).append(row)
    by_size = sorted(kinds.values(), key=len, reverse=True)
    rounds = zip_longest(*by_size)
    return [row for one in rounds for row in one if row is not None][:count]


def pairs(row: Row) -> Iterator[tuple[str, str, str]]:
    """An answer beside its critique, step by step: the answer's step, a mark, the critique's.

    Marks are those of `MARKS`. The final answers come last.
    """
    critique, left = row["critique"], list(row["answer_steps"])
    for step in critique["steps"]:
        if step["original"] is not None and step["original"] in left:
            left.remove(step["original"])
    for step in critique["steps"]:
        own = step["original"]
        if own is None and step["status"] == "new" and left:
            own = left.pop(0)
        yield own or "", step["status"], step["text"]
    for own in left:
        yield own, "gone", ""
    same = row["parsed"] == critique["answer"]
    mark = "kept" if same else "new" if row["parsed"] is None else "fixed"
    yield row["parsed"] or "", mark, critique["answer"]


def _print_pair(number: int, row: Row, console: Console) -> None:
    critique, verdict = row["critique"], "right" if row["correct"] else "wrong"
    console.rule(
        Text(plain(f"{number}. {row['problem_id']}, answer {row['sample']}")), align="left"
    )
    console.print(Text(f"the answer is {verdict}; the critic: {_told(row)}", style="bold"))
    console.print(Text(f"question: {_short(row['question'])}"))
    table = Table(box=None, padding=(0, 1), header_style="dim", expand=True, caption=" ")
    for title, ratio in (("answer", 1), ("", None), ("critique", 1)):
        table.add_column(title, ratio=ratio, no_wrap=not title, overflow="fold")
    if "reason" in critique:
        _row(table, _short(row["answer"]), "", _short(critique.get("said") or "(nothing)"))
    else:
        for own, mark, told in pairs(row):
            _row(table, _short(own), mark, _short(told), style=MARKS[mark])
    console.print(table)


def _told(row: Row) -> str:
    critique = row["critique"]
    if "reason" in critique:
        return f"{critique['reason']}, {plain(critique['detail'])}"
    change, case = row["first_change"], critique["case"]
    step = change["step"]
    at = "nothing changed" if step is None else f"first change in step {step + 1}"
    return f"case {case} ({CASES[case]}), {at}, fidelity {change['fidelity']:.2f}"


def _kind(row: Row) -> str:
    return row["critique"].get("reason") or row["critique"]["case"]


def _outcomes(summary: Summary) -> Table:
    table = _table("what came back", "answers", "share", "")
    for case, count in summary.cases.items():
        _row(table, f"case {case}: {CASES[case]}", f"{count:,}", _share(count, summary.answers))
    for reason, count in summary.failures.items():
        meaning = f"{reason}: {OUTCOMES[reason]}" if reason in OUTCOMES else reason
        _row(table, meaning, f"{count:,}", _share(count, summary.answers))
    _row(table, "all", f"{summary.answers:,}", "")
    return table


def _agreement(summary: Summary) -> Table:
    wrong = summary.answers - summary.right
    table = _table("against the verifier", "answers", "share", "of")
    solved = summary.critiques
    for title, count, of, whose in (
        ("the critic's own final answer is right", solved, summary.answers, "all answers"),
        ("false alarms: a step of a right answer is replaced", summary.false_alarms,
         summary.right, "right answers"),
        ("right answers that are added to", summary.added, summary.right, "right answers"),
        ("misses: the wrong answer is given again", summary.misses, wrong, "wrong answers"),
    ):  # fmt: skip
        _row(table, title, f"{count:,}", _share(count, of), f"{of:,} {whose}")
    return table


def _fidelity(summary: Summary) -> Table:
    table = _table("fidelity: tokens before the first change", "critiques", "", "")
    if not summary.fidelity:
        _row(table, "no critique to measure", "0")
        return table
    _row(table, f"mean {summary.mean_fidelity:.2f}", f"{len(summary.fidelity):,}")
    for share in QUANTILES:
        _row(table, f"{share:.0%} have at most {summary.quantile(share):.2f}", "")
    for index, count in enumerate(summary.histogram()):
        name = f"{index / 10:.1f} to {(index + 1) / 10:.1f}"
        _row(table, f"  {name}", f"{count:,}", _bar(count, max(summary.histogram())))
    return table


def _first_changes(summary: Summary) -> Table:
    table = _table("where the first change is", "critiques", "", "")
    most = max(summary.changed_at.values(), default=0)
    for step, count in summary.changed_at.items():
        name = "nowhere" if step < 0 else f"step {step + 1}"
        _row(table, f"  {name}", f"{count:,}", _bar(count, most))
    return table


def _cost(summary: Summary, seconds: float) -> Table:
    table = _table("what it took", "in all", "per answer", "")
    used: Mapping[str, Any] = summary.usage
    for title, name in (
        ("requests that were sent", "requests"), ("replies from the cache", "cached"),
        ("prompt tokens", "prompt_tokens"), ("tokens written", "completion_tokens"),
    ):  # fmt: skip
        each = used[name] / max(1, summary.answers)
        _row(table, title, f"{used[name]:,.0f}", f"{each:,.1f}")
    _row(table, "cost", f"{used['cost']:,.4f}", f"{used['cost'] / max(1, summary.answers):,.4f}")
    _row(table, "seconds", f"{seconds:,.1f}", f"{seconds / max(1, summary.answers):,.2f}")
    return table


def _table(*titles: str) -> Table:
    table = Table(box=None, padding=(0, 1), header_style="bold", caption=" ")
    for i, title in enumerate(titles):
        table.add_column(Text(title), justify="right" if i in (1, 2) else "left")
    if titles[-2:] == ("", ""):
        table.columns[2].justify = "left"  # bars
    return table


def _row(table: Table, *cells: str, style: str = "") -> None:
    """Cells are text: never markup, and without what would act on a terminal."""
    table.add_row(*(Text(plain(cell)) for cell in cells), style=style)


def _bar(count: int, most: int) -> str:
    return "#" * -(-BAR * count // most) if most else ""


def _share(count: int, of: int) -> str:
    return f"{count / of:.0%}" if of else "–"


def _short(text: str) -> str:
    text = plain(text).strip()
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}… ({len(text):,} characters)"
