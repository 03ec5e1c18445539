"""Problem sets from rows: sources, filters, duplicates, splits; what is left out is counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from selfteach.config.data_section import Columns, FilesData, HubData, RowsData
from selfteach.errors import DataError, RecipeError
from selfteach.tasks.sources.columns import SOURCES, Missing, bad_row, column_value, problem_from
from selfteach.tasks.sources.hub import read_hub
from selfteach.tasks.sources.rows import Row, read_rows
from selfteach.tasks.sources.splits import Splits, disjoint, split_pool, without_duplicates
from selfteach.types import Problem


def read_problem_sets(
    config: FilesData | HubData, *, allow_no_source: bool = False
) -> tuple[Splits, Counter[str]]:
    """Train, validation and test of a recipe's files or dataset, and what was left out of them.

    Duplicates of a question are removed, in each source and across them. Raises `DataError` or
    `RecipeError` in one line, also where no source is named unless there ``allow_no_source``.
    """
    sources = {name: where for name in SOURCES if (where := getattr(config, name))}
    if not sources and not allow_no_source:
        raise RecipeError(
            f'data.type = "{config.type}": name a source: train, validation, test, or a pool'
        )
    counts: Counter[str] = Counter()
    read: Splits = {}
    for name, where in sources.items():
        parts = where if isinstance(where, tuple) else (where,)
        problems = [p for part in parts for p in _problems(config, part, counts)]
        read[name], again = without_duplicates(problems)
        counts["duplicates"] += again
        _distinct_ids(read[name], ", ".join(parts))
    splits, counts["in two sources"] = disjoint(read)
    pool = splits.pop("pool")
    if "pool" in sources:
        splits |= {
            name: problems
            for name, problems in split_pool(pool, config.split, named=sources).items()
            if name not in sources
        }
    return splits, +counts


def read_file(path: Path) -> tuple[Problem, ...]:
    """The problems of one file with columns of our own names. Raises `DataError`."""
    problems = _problems(FilesData(type="files"), str(path), Counter())
    _distinct_ids(problems, str(path))
    return tuple(problems)


def _problems(config: RowsData, source: str, counts: Counter[str]) -> list[Problem]:
    """Problems of one file or split. Raises `DataError` for the first bad row, or if none is good."""
    columns = config.columns or Columns()
    problems: list[Problem] = []
    first_bad: DataError | None = None
    for row in islice(_chosen(config, source, counts), config.limit):
        try:
            problems.append(problem_from(row, columns))
        except Missing as missing:
            first_bad = first_bad or bad_row(row, missing)
            if config.bad_rows == "stop":
                raise first_bad from None
            counts["bad rows"] += 1
    if not problems:
        raise first_bad or DataError(f"{source}: the problem set is empty")
    return problems


def _chosen(config: RowsData, source: str, counts: Counter[str]) -> Iterator[Row]:
    """Rows that ``only`` lets through."""
    for row in _rows(config, source):
        counts["rows"] += 1
        try:
            keep = all(
                column_value(row.values, column) in _several(wanted)
                for column, wanted in config.filter.items()
            )
        except Missing as missing:
            raise DataError(f"{row.where}: data.filter: {missing}") from None
        if keep:
            yield row
        else:
            counts["not in data.filter"] += 1


def _rows(config: RowsData, source: str) -> Iterator[Row]:
    if not isinstance(config, HubData):
        return read_rows(Path(source))
    if config.path is None:
        raise RecipeError('data.type = "hub" needs a data.path, or a data.mapping that has one')
    settings = {"name": config.name, "revision": config.revision, "streaming": config.streaming}
    return read_hub(config.path, source, **settings)  # type: ignore[arg-type]


def _several(wanted: Any) -> Sequence[Any]:
    return wanted if isinstance(wanted, list | tuple) else (wanted,)


def _distinct_ids(problems: Sequence[Problem], where: str) -> None:
    counted = Counter(problem.id for problem in problems)
    id_, count = counted.most_common(1)[0]
    if count > 1:
        raise DataError(f"{where}: two problems have the same id {id_!r}")
