"""Results on the terminal: the report's tables, as plain text of up to 100 columns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from selfteach.analysis.wording import (
    BUDGET,
    MEASURES,
    Results,
    Setting,
    count,
    difference,
    estimate,
    headline,
    measure,
    order,
    pair_title,
    pairs,
    standing,
)

SCORES = ("avg", "pass", "maj")
"""Shown with their interval; the other measures as means only."""
COLOURS = {"higher": "green", "lower": "red", "open": "dim"}


def print_results(results: Results, console: Console) -> None:
    """Print arms, paired differences, budget and variants; means are over seeds and problems."""
    seeds = ", ".join(str(seed) for seed in results["seeds"])
    if results["title"]:
        console.print(Text(results["title"], style="bold"))
    console.print(Text(f"mean [95 % interval], rates in %; seeds {seeds}", style="dim"))
    console.print(_arms(results, results["k"]))
    if results["paired"]:
        console.print(_pairs(results))
    console.print(_budget(results))
    for name, variant in results.get("variants", {}).items():
        _print_variant(results, variant, variant["title"] or name, console)


def print_evaluation(result: Mapping[str, Any], console: Console) -> None:
    """Print one model's measures, each with its interval over problems (`api.evaluate_model`)."""
    console.print(Text(f"{result['what']}: {result['split']}, {result['problems']} problems"))
    table = _table([("", "left"), ("mean [95 % interval]", "right")])
    for name in MEASURES:
        _row(table, [measure(name, result["k"]), estimate(result[name])])
    console.print(table)


def _arms(setting: Setting, k: int) -> Table:
    titles = [measure(name, k).replace(", %", "").replace(", tokens", "") for name in MEASURES]
    table = _table([("arm", "left"), *((title, "right") for title in titles)])
    for name, arm in setting["arms"].items():
        scores = [estimate(arm[score]) for score in SCORES]
        others = [f"{arm[other]['mean']:.1f}" for other in MEASURES if other not in SCORES]
        lost = arm.get("collapsed") or []
        note = f" ({len(lost)} collapsed)" if lost else ""
        _row(table, [name + note, *scores, *others])
    return table


def _pairs(results: Results) -> Table:
    titles = [measure(name, results["k"]).removesuffix(", %") for name in SCORES]
    columns = [("difference", "left"), *((title, "right") for title in titles)]
    table = _table([*columns, ("interval excludes 0", "left")])
    for pair in pairs(results, results):
        values = results["paired"][pair]
        clear = [
            title for name, title in zip(SCORES, titles, strict=True)
            if standing(values[name]) != "open"
        ]  # fmt: skip
        cells = [difference(values[name]) for name in SCORES]
        _row(table, [pair_title(pair), *cells, ", ".join(clear) or "none"], _colour(values["avg"]))
    return table


def _budget(setting: Setting) -> Table:
    known = [key for key in BUDGET if any(key in arm["budget"] for arm in setting["arms"].values())]
    table = _table([("mean per seed", "left"), *((BUDGET[key], "right") for key in known)])
    for name, arm in setting["arms"].items():
        spent = arm["budget"]
        _row(table, [name, *(count(spent[key]) if key in spent else "" for key in known)])
    return table


def _print_variant(results: Results, variant: Setting, title: str, console: Console) -> None:
    seeds = ", ".join(str(seed) for seed in variant["seeds"])
    means = [f"{name} {arm['avg']['mean']:.1f}" for name, arm in variant["arms"].items()]
    console.print(Text(f"{title}; seeds {seeds}", style="bold"))
    console.print(Text(f" Avg@{results['k']}: {', '.join(means)}"))
    table = _table([("", "left"), ("", "right"), ("", "left")])
    for pair in (pair for pair in headline(results) if pair in variant["paired"]):
        value, main = variant["paired"][pair]["avg"], results["paired"][pair]["avg"]
        _row(table, [pair_title(pair), difference(value), order(value, main)], _colour(value))
    if table.row_count:
        console.print(table)


def _colour(value: Mapping[str, Any]) -> str:
    return COLOURS[standing(value)]


def _table(columns: Iterable[tuple[str, str]]) -> Table:
    """A table without rules, titles dim; cells are never read as markup."""
    columns = list(columns)
    heads = any(title for title, _ in columns)
    table = Table(box=None, show_header=heads, pad_edge=True, padding=(0, 1), header_style="dim")
    for title, side in columns:
        table.add_column(Text(title), justify=side)  # type: ignore[arg-type]
    return table


def _row(table: Table, cells: Sequence[str], style: str = "") -> None:
    table.add_row(*(Text(cell) for cell in cells), style=style)
