"""Builds problem sets from rows: filters, removes duplicates, splits, and counts what is left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from selfteach.config.data_section import Columns, FilesData, HubData, RowsData, Splitting
from selfteach.errors import DataError, RecipeError
from selfteach.tasks.code.code_tests import with_tests
from selfteach.tasks.sources.columns import (
    SOURCES,
    bad_row,
    content_id,
    matches,
    problem_from,
)
from selfteach.tasks.sources.hub import read_hub
from selfteach.tasks.sources.recognised import ColumnsRead, described
from selfteach.tasks.sources.rows import read_rows
from selfteach.tasks.sources.source_row import MissingValue, Row
from selfteach.tasks.sources.splits import (
    Splits,
    disjoint,
    spelled_alike,
    split_pool,
    without_duplicates,
)
from selfteach.types import Problem


def read_problem_sets(
    config: FilesData | HubData,
    *,
    allow_no_source: bool = False,
    keep_rows: bool = False,
    need_answers: bool = True,
) -> tuple[Splits, Counter[str], str]:
    """Read train, validation and test of a recipe's files or dataset, and count what is left out.

    The third value says in one line which columns were read for what. Duplicates of a question are
    removed, in each source and across sources. Raises `DataError` or
    `RecipeError`, in one line, also if no source is named, unless ``allow_no_source``. With
    ``keep_rows`` problems have the columns of their rows; without ``need_answers`` these may lack an
    answer.
    """
    sources = {name: source for name in SOURCES if (source := getattr(config, name))}
    if not sources and not allow_no_source:
        raise RecipeError(
            f'data.type = "{config.type}": name a source: train, validation, test, or a pool'
        )
    if config.split != Splitting() and "pool" not in sources:
        raise RecipeError(
            "data.split divides data.pool, and the recipe names none: put the file or split that is to "
            "be divided in data.pool, or remove data.split"
        )
    counts: Counter[str] = Counter()
    columns: ColumnsRead = {}
    read: Splits = {}
    for name, source in sources.items():
        files = source if isinstance(source, tuple) else (source,)
        problems: list[Problem] = []
        for file in files:
            all_rows = _problems(
                config, file, name, counts, columns, need_answers=need_answers,
                keep_rows=keep_rows or config.split.by is not None,
            )  # fmt: skip
            unique, duplicates = without_duplicates(all_rows)
            _check_ids(unique, file)
            counts["duplicates"] += duplicates
            problems += unique
        read[name] = problems
    splits, counts, described_columns = combined(read, columns, counts)
    pool = splits.pop("pool", [])
    if "pool" in sources:
        splits |= {
            name: problems
            for name, problems in split_pool(pool, config.split, named=sources).items()
            if name not in sources
        }
    if config.split.by and not keep_rows:
        splits = {
            name: [replace(problem, columns={}) for problem in problems]
            for name, problems in splits.items()
        }
    return splits, counts, described_columns


def combined(
    read: Splits, columns: ColumnsRead, counts: Counter[str] | None = None
) -> tuple[Splits, Counter[str], str]:
    """Return splits without a question that is in two, and with ids that name one problem each.

    Also what is left out, added to ``counts``, and in one line which columns were read for what.
    """
    unique: Splits = {}
    counted = Counter(counts or {})
    for name, problems in read.items():
        unique[name], duplicates = without_duplicates(problems)
        counted["duplicates"] += duplicates
    splits, counted["in two sources"] = disjoint(unique)
    splits, counted["ids that name two problems"] = _with_distinct_ids(splits)
    counted["in train and spelled alike in validation or test"] = spelled_alike(splits)
    return splits, +counted, described(columns)


def read_file(path: Path, *, need_answers: bool = True) -> tuple[Problem, ...]:
    """Read the problems of one file with the default columns. Raises `DataError`."""
    config = FilesData(type="files")
    problems = _numbered(
        _problems(
            config, str(path), "test", Counter(), {}, keep_rows=True, need_answers=need_answers
        )
    )
    _check_ids(problems, str(path))
    return tuple(problems)


def _numbered(problems: Sequence[Problem]) -> list[Problem]:
    """Number the repetitions of a problem without an id, so that a file may hold it several times."""
    seen: Counter[str] = Counter()
    numbered = []
    for problem in problems:
        seen[problem.id] += 1
        if problem.place and seen[problem.id] > 1:
            problem = replace(problem, id=f"{problem.id}_{seen[problem.id]}")
        numbered.append(problem)
    return numbered


def _with_distinct_ids(splits: Splits) -> tuple[Splits, int]:
    """Give all problems ids from their content if an id of one file names another problem elsewhere.

    Also returns how many ids name two problems. A problem's own id becomes its place.
    """
    ids = Counter(problem.id for problems in splits.values() for problem in problems)
    repeated = sum(count > 1 for count in ids.values())
    if not repeated:
        return splits, 0
    return {name: [_by_content(p) for p in problems] for name, problems in splits.items()}, repeated


def _by_content(problem: Problem) -> Problem:
    if problem.place:  # it has no id but that of its content
        return problem
    id_ = content_id(problem.question, problem.answer, problem.history)
    return replace(problem, id=id_, place=problem.id)


def _problems(
    config: RowsData, source: str, split: str, counts: Counter[str], read: ColumnsRead, *,
    keep_rows: bool, need_answers: bool,
) -> list[Problem]:  # fmt: skip
    """Read one file or split. Raises `DataError` for the first bad row, or if no row is good."""
    columns = config.columns or Columns()
    problems: list[Problem] = []
    first_bad: DataError | None = None
    for row in islice(_filtered(config, source, split, counts), config.limit):
        try:
            problem = problem_from(row, columns, read, keep_row=keep_rows, need_answer=need_answers)
            problems.append(
                with_tests(problem, row, config.code) if config.verifier == "code" else problem
            )
        except MissingValue as missing:
            first_bad = first_bad or bad_row(row, missing)
            if config.bad_rows == "stop":
                raise first_bad from None
            counts["bad rows"] += 1
    if not problems:
        raise first_bad or DataError(f"{source}: the problem set is empty")
    return problems


def _filtered(config: RowsData, source: str, split: str, counts: Counter[str]) -> Iterator[Row]:
    """Yield the rows that ``data.filter`` keeps."""
    for row in _rows(config, source, split):
        counts["rows"] += 1
        try:
            keep = all(
                matches(row, column, _as_sequence(allowed))
                for column, allowed in config.filter.items()
            )
        except MissingValue as missing:
            raise DataError(f"{row.where}: data.filter: {missing}") from None
        if keep:
            yield row
        else:
            counts["not in data.filter"] += 1


def _rows(config: RowsData, source: str, split: str) -> Iterator[Row]:
    if not isinstance(config, HubData):
        return read_rows(Path(source), split)
    if config.path is None:
        raise RecipeError('data.type = "hub" needs a data.path, or a data.mapping that has one')
    settings = {"name": config.name, "revision": config.revision, "streaming": config.streaming}
    return read_hub(config.path, source, **settings)  # type: ignore[arg-type]


def _as_sequence(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else (value,)


def _check_ids(problems: Sequence[Problem], where: str) -> None:
    """Raise `DataError` if two problems have the same id."""
    ids = Counter(problem.id for problem in problems)
    id_, count = ids.most_common(1)[0]
    if count > 1:
        raise DataError(
            f"{where}: two problems have the same id {id_!r}: name a column with an id of each, "
            'data.columns.id = "…"'
        )
