"""Reads the problems of an environment of `verifiers`, and finds its row again for each of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from selfteach.config.data_section import Columns, EnvironmentData
from selfteach.errors import DataError
from selfteach.tasks.hub_environments.attempts import SingleTurn, listed_weights
from selfteach.tasks.hub_environments.import_environment import build_environment
from selfteach.tasks.sources.columns import bad_row, problem_from
from selfteach.tasks.sources.load import combined
from selfteach.tasks.sources.recognised import ColumnsRead
from selfteach.tasks.sources.source_row import MissingValue, Row
from selfteach.tasks.sources.splits import Splits, split_pool
from selfteach.types import Problem

PLACE = "environment row"
"""Column of a problem's row, while problems are read: which environment's, and its index there."""


@dataclass(frozen=True, slots=True)
class HubEnvironment:
    """Holds the environment of a task, and its second load for the test split, if there is one."""

    loads: tuple[SingleTurn, ...]
    places: Mapping[str, tuple[int, int]]
    """Index of the load and of the row, by the id of a problem."""

    @property
    def weights(self) -> Mapping[str, float]:
        """Return the weight of each reward by its name."""
        return self.loads[0].weights

    @property
    def label(self) -> str:
        """Return the environment's name for error messages."""
        return self.loads[0].label

    @property
    def description(self) -> str:
        """Return in one line what the environment rewards."""
        return f"{self.label}: rewards {listed_weights(self.weights)}"

    def place(self, problem: Problem) -> tuple[int, int]:
        """Return the place of a problem's row. Raises `DataError` for a problem of another source."""
        if problem.id not in self.places:
            raise DataError(
                f"problem {problem.label!r} is not of the {self.label}, which rewards its own alone"
            )
        return self.places[problem.id]


def read_environment(
    config: EnvironmentData, *, need_answers: bool, episodes: bool = False
) -> tuple[HubEnvironment, Splits, Mapping[str, int], str]:
    """Read the problems of an environment, split, and count what is left out.

    Also returns in one line which columns were read for what. Raises `DataError`, `PartError` or
    `RecipeError` in one line.
    """
    first = build_environment(config, config.options, episodes=episodes)
    pool, test = first.rows(config.limit), first.held_out(config.limit)
    loads, sources = [first], [(0, 0, pool), (0, len(pool), test)]
    if config.test_options is not None:
        options = {**config.options, **config.test_options}
        second = build_environment(config, options, episodes=episodes)
        rows, held_out = second.rows(config.limit), second.held_out(config.limit)
        offset = len(rows) if held_out else 0
        sources[1] = (1, offset, held_out or rows)
        loads.append(second)
        if dict(second.weights) != dict(first.weights):
            raise DataError(
                f"{first.label}: with data.test_options it has other rewards than without"
            )
    read: ColumnsRead = {}
    problems = [
        [_problem(row, (load, offset + i), read, need_answers) for i, row in enumerate(rows)]
        for load, offset, rows in sources
    ]
    if not problems[0]:
        raise DataError(f"{first.label}: it has no problems")
    read_sources: Splits = {"pool": problems[0], **({"test": problems[1]} if problems[1] else {})}
    counts = Counter(rows=sum(len(rows) for _, _, rows in sources))
    splits, counted, columns = combined(read_sources, read, counts)
    chosen = split_pool(
        splits.pop("pool"), config.split, named=[n for n in read_sources if n != "pool"]
    )
    splits = {**splits, **{n: p for n, p in chosen.items() if n not in read_sources}}
    places = {p.id: p.columns[PLACE] for split in splits.values() for p in split}
    plain = {name: [_without_place(p) for p in split] for name, split in splits.items()}
    return HubEnvironment(tuple(loads), places), plain, counted, columns


def _problem(row: Row, place: tuple[int, int], read: ColumnsRead, need_answers: bool) -> Problem:
    columns = Columns(question="prompt")
    try:
        problem = problem_from(row, columns, read, keep_row=True, need_answer=need_answers)
    except MissingValue as missing:
        raise bad_row(row, missing) from None
    return replace(problem, columns={**problem.columns, PLACE: place})


def _without_place(problem: Problem) -> Problem:
    values: dict[str, Any] = {name: v for name, v in problem.columns.items() if name != PLACE}
    return replace(problem, columns=values)
