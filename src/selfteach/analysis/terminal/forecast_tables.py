"""Print a forecast: a table of measures and costs with a row per arm, then the verdicts in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

VERDICTS = {
    "can": "can be expected to teach",
    "cannot": "cannot be expected to teach",
    "undecided": "undecided",
}
COLOURS = {"can": "green", "cannot": "red", "undecided": "yellow"}
COLUMNS = (
    ("right\n%", "right", 0),
    ("mixed\n%", "mixed_groups", 0),
    ("usable\n%", "usable_critiques", 0),
    ("shown\n%", "shown", 0),
    ("edge,\npoints", "edge", 0),
    ("edge on\nwrong", "edge_on_wrong", 0),
    ("KL,\nnats", "divergence", 2),
    ("con-\ntrast", "contrast", 1),
    ("failing\nstep, %", "failing_mass", 0),
    ("last\nstep, %", "end_mass", 0),
    ("style\nleak", "style_leak", 1),
)
"""Columns of the table: title, measure, decimals."""

MOST_COLUMNS = 6
"""Columns of measures in a table on a narrow terminal."""
Column = tuple[str, str, int]
COST_TITLES = (
    "rollouts", "tokens\nsampled", "tokens\nstudent", "tokens\nteacher", "s to\nsample",
    "s to\ncritique", "s to\nlearn", "s in all", "hours for\nall steps",
)  # fmt: skip
COUNTS = ("rollouts", "tokens_sampled", "tokens_student", "tokens_teacher")
ESTIMATED = (
    "Seconds are estimated: rates measured here, scaled to a step; without evaluation, checkpoints and "
    "the optimizer's update. –: not measured."
)
BY_RATE = (
    "Mixed groups: a group has more rollouts than were sampled of a problem, so that the problem's "
    "rate stands for it, which errs low."
)

Forecast = Mapping[str, Any]


def print_forecast(forecast: Forecast, console: Console) -> None:
    """Print the table, the cost of a step, and the verdicts."""
    arms = forecast["arms"]
    problems = max(arm["problems"] for arm in arms.values())
    console.print(
        Text(
            f"{problems} validation problems, {forecast['k']} rollouts each, of the untrained model; "
            "95 % intervals over problems"
        )
    )
    for table in _measures(arms, console):
        console.print(table)
    console.print(_costs(arms))
    for line in _remarks(forecast):
        console.print(Text(line, style="dim"))
    for name, arm in arms.items():
        line = Text(f"{name}: ", style="bold")
        line.append(VERDICTS[arm["verdict"]], style=COLOURS[arm["verdict"]])
        reasons = "; ".join(arm["reasons"])
        line.append(f": {reasons}" if reasons else "", style="not bold")
        console.print(line)


def _measures(arms: Mapping[str, Forecast], console: Console) -> list[Table]:
    """Return one table, or two where the terminal is too narrow for one."""
    columns = [
        column
        for column in COLUMNS
        if any(arm["measures"].get(column[1]) is not None for arm in arms.values())
    ]
    table = _measures_table(arms, columns)
    if console.measure(table).maximum <= console.width or len(columns) < MOST_COLUMNS:
        return [table]
    return [
        _measures_table(arms, part) for part in (columns[:MOST_COLUMNS], columns[MOST_COLUMNS:])
    ]


def _measures_table(arms: Mapping[str, Forecast], columns: Sequence[Column]) -> Table:
    table = _table(["arm", *(title for title, _, _ in columns)])
    for name, arm in arms.items():
        # The interval is below its mean, so that the measures fit a terminal.
        cells = [_cell(arm["measures"].get(key), digits) for _, key, digits in columns]
        table.add_row(*map(Text, (name, *cells)))
    return table


def _costs(arms: Mapping[str, Forecast]) -> Table:
    table = _table(["a step of", *COST_TITLES])
    for name, arm in arms.items():
        step = arm["step"]
        counts = [step[key] for key in COUNTS]
        seconds = [step[f"seconds_{kind}"] for kind in ("sampling", "critique", "learning")]
        total = step["seconds"]
        hours = None if total is None else total * step["steps"] / 3600
        cells = [f"{count:,.0f}" for count in counts]
        cells += [_seconds(value) for value in (*seconds, total)]
        table.add_row(*map(Text, (name, *cells, "–" if hours is None else f"{hours:.2g}")))
    return table


def _remarks(forecast: Forecast) -> list[str]:
    arms = forecast["arms"]
    lines = [ESTIMATED]
    if any(arm["mixed_groups_from"] == "each problem's rate" for arm in arms.values()):
        lines.append(BY_RATE)
    for name, arm in arms.items():
        kinds = (("critic", arm["critic_failures"]), ("no context", arm["without_context"]))
        for title, counts in kinds:
            if counts:
                listed = ", ".join(f"{count} {reason}" for reason, count in counts.items())
                lines.append(f"{name}, {title}: {listed}")
    return [*lines, *forecast["notes"], ""]


def _cell(value: Mapping[str, Any] | None, digits: int) -> str:
    if value is None:
        return "–"
    low, high = value["ci95"]
    return f"{value['mean']:.{digits}f}\n{low:.{digits}f}…{high:.{digits}f}"


def _seconds(value: float | None) -> str:
    return "–" if value is None else f"{value:,.2f}" if value < 10 else f"{value:,.0f}"


def _table(titles: list[str]) -> Table:
    table = Table(box=None, padding=(0, 1), header_style="dim", caption=" ")
    for index, title in enumerate(titles):
        table.add_column(Text(title), justify="right" if index else "left", no_wrap=True)
    return table
