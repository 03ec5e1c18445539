"""Print the report's tables of results as plain text of up to 100 columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from selfteach.analysis.critic_statistics import ArmCritic, summary_line
from selfteach.analysis.results_table import MEASURES
from selfteach.analysis.results_text import (
    BUDGET_TITLES,
    Estimate,
    Results,
    Setting,
    budget_columns,
    budgets,
    count,
    decision,
    difference,
    estimate,
    headline_pairs,
    measure_title,
    ordered_pairs,
    pair_title,
    seeds_caveat,
    variant_order,
)

SCORES = ("avg", "pass", "maj")
"""Measures in the table of differences."""
SHORT_TITLES = {"length": "tokens"}
EVALUATION_CAVEAT = "Intervals cover other problems, not other training runs."
COLOURS = {"higher": "green", "lower": "red", "open": "dim", "one seed": "dim"}


def print_results(results: Results, console: Console) -> None:
    """Print arms, paired differences, budget and variants; means are over seeds and problems."""
    if results["title"]:
        console.print(Text(results["title"], style="bold"))
    seeds = ", ".join(str(seed) for seed in results["seeds"])
    star = "; *: it excludes 0" if len(results["seeds"]) > 1 else ""
    console.print(Text(f"seeds {seeds}; mean [95 % interval], rates in %{star}"))
    if caveat := seeds_caveat(results["seeds"]):
        console.print(Text(caveat, style="dim"))
    _print_collapsed(results, console)
    console.print()
    console.print(_arms(results, results["k"]))
    if results["paired"]:
        console.print(_pairs(results))
    console.print(_budget(results))
    for name, variant in results.get("variants", {}).items():
        _print_variant(results, variant, variant["title"] or name, console)


def print_evaluation(result: Mapping[str, Any], console: Console) -> None:
    """Print one model's measures, each with its interval over problems (`api.evaluate`)."""
    console.print(Text(f"{result['what']}: {result['split']}, {result['problems']} problems"))
    table = _table(["", "mean [95 % interval]"])
    for name in MEASURES:
        _row(table, [measure_title(name, result["k"]), estimate(result[name])])
    console.print(table)
    console.print(Text(EVALUATION_CAVEAT, style="dim"))


def print_critics(critics: Mapping[str, ArmCritic], console: Console) -> None:
    """Print one line for each arm whose critic is a model: its outcomes and cost, over all seeds."""
    for arm, critic in critics.items():
        if critic.total.is_model:
            line = (
                f" critic of {arm}: {summary_line(critic.total)}; {count(critic.seconds)} seconds"
            )
            console.print(Text(line))


def _arms(setting: Setting, k: int) -> Table:
    table = _table(["arm", *(_short_title(name, k) for name in MEASURES)])
    for name, arm in setting["arms"].items():
        # The interval is below its mean, so that six measures fit a narrow terminal.
        cells = [estimate(arm[key]).replace(" [", "\n[", 1) for key in MEASURES]
        _row(table, [name, *cells])
    return table


def _print_collapsed(setting: Setting, console: Console) -> None:
    total = len(setting["seeds"])
    for name, arm in setting["arms"].items():
        if seeds := arm.get("collapsed", []):
            console.print(Text(f" collapsed: {name} {len(seeds)} of {total} seeds", style="red"))


def _pairs(results: Results) -> Table:
    table = _table(["difference", *(_short_title(name, results["k"]) for name in SCORES)])
    for pair in ordered_pairs(results, results):
        values = results["paired"][pair]
        cells = [_starred(values[name]) for name in SCORES]
        _row(table, [pair_title(pair), *cells], _colour(values["avg"]))
    return table


def _budget(setting: Setting) -> Table:
    columns = budget_columns(budgets(setting))
    shown = [key for key in columns if key != "evaluation_rollouts"]  # the same for every arm
    table = _table(["per seed", *(BUDGET_TITLES[key] for key in shown)])
    for name, arm in setting["arms"].items():
        budget = arm["budget"]
        _row(table, [name, *(count(budget[key]) if key in budget else "" for key in shown)])
    return table


def _print_variant(results: Results, variant: Setting, title: str, console: Console) -> None:
    seeds = ", ".join(str(seed) for seed in variant["seeds"])
    means = [f"{name} {arm['avg']['mean']:.1f}" for name, arm in variant["arms"].items()]
    console.print(Text(f"{title}; seeds {seeds}", style="bold"))
    console.print(Text(f" Avg@{results['k']}: {', '.join(means)}"))
    _print_collapsed(variant, console)
    table = _table(["", "", ""])
    for pair in (pair for pair in headline_pairs(results) if pair in variant["paired"]):
        value, main = variant["paired"][pair]["avg"], results["paired"][pair]["avg"]
        _row(table, [pair_title(pair), _starred(value), variant_order(value, main)], _colour(value))
    if table.row_count:
        console.print(table)


def _short_title(name: str, k: int) -> str:
    return SHORT_TITLES.get(name) or measure_title(name, k).removesuffix(", %")


def _starred(value: Estimate) -> str:
    return difference(value) + ("*" if decision(value) in ("higher", "lower") else " ")


def _colour(value: Estimate) -> str:
    return COLOURS[decision(value)]


def _table(titles: Sequence[str]) -> Table:
    """Make a table without rules: names to the left, numbers to the right, an empty line below."""
    table = Table(
        box=None, show_header=any(titles), padding=(0, 1), header_style="dim", caption=" "
    )  # fmt: skip
    for i, title in enumerate(titles):
        table.add_column(Text(title), justify="right" if i else "left", no_wrap=i == 0)
    return table


def _row(table: Table, cells: Sequence[str], style: str = "") -> None:
    """Add a row; cells are never read as markup."""
    table.add_row(*(Text(cell) for cell in cells), style=style)
