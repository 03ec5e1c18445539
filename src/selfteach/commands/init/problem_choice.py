"""Chooses the recipe's [data] for a file, a data set of the hub, or a generator, from what is in it."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from selfteach.config.data_section import ORACLE_DATA, Columns, DataConfig
from selfteach.config.recipe import Recipe
from selfteach.config.schema import validate
from selfteach.errors import DataError, RecipeError
from selfteach.models.model_path import may_be_hub_id
from selfteach.tasks.sources.columns import problem_from, ready_mappings
from selfteach.tasks.sources.recognised import recognised
from selfteach.tasks.sources.rows import KINDS, is_problem_source, read_rows
from selfteach.tasks.sources.source_row import MissingValue, Row
from selfteach.tasks.task import Task, load_task

SAMPLED_ROWS = 200
"""Rows of a file that decide how its answers are read."""
MOST = 0.8
"""Share of the sampled answers that must have a form for it to be chosen."""
LARGEST_VALIDATION, LARGEST_TEST = 64, 200
"""Most problems that are put aside for validation and for the test."""
FORMS = {"####": ("after:####", "before:####"), "\\boxed{": ("boxed", None)}
"""What an answer's column holds where it is a worked solution, and the rules that read both from it."""
WORD = re.compile(r"[A-Za-z]{4,}")
LATEX = re.compile(r"\\text\s*\{[^}]*\}|\\[A-Za-z]+")
QUANTITY = re.compile(r"\d|\\frac|\\sqrt|\\pi|π|^[a-zA-Z]$")
COLUMN_SETTING = re.compile(r'data\.columns\.(\w+) = "…"')


@dataclass(frozen=True, slots=True)
class ProblemChoice:
    """Holds a recipe's [data] section, the problems that it names, and why it is what it is."""

    section: Mapping[str, Any]
    task: Task
    is_math: bool = False
    """True if answers are compared as mathematics."""
    reasons: Mapping[str, str] = field(default_factory=dict)
    """Comments by key of the section."""

    @property
    def has_oracle(self) -> bool:
        """Return True if a program can critique rollouts to these problems."""
        return self.section["type"] in ORACLE_DATA

    @property
    def with_reference(self) -> int:
        """Return the number of training problems that have a worked solution."""
        return sum("reference" in problem.references for problem in self.task.train)


def choose_problems(
    named: str, model_folder: str, *, test: str | None = None, columns: Sequence[str] = ()
) -> ProblemChoice:
    """Return the [data] section for what ``--data`` names, with its problems read.

    ``named`` is a file or folder of problems, ``lab`` or ``chain_sums``, the name of a built-in
    mapping, or the id of a hub data set; ``columns`` are ``question=COLUMN`` settings. Raises
    `DataError` or `RecipeError` in one line.
    """
    settings = _columns(columns)
    if is_problem_source(path := Path(named).expanduser()) or path.exists():
        return _files(path, test, settings, model_folder)
    mappings = ready_mappings()
    if test is not None or (settings and named in (*ORACLE_DATA, *mappings)):
        raise RecipeError(f"--test and --column are for files of problems, and --data is {named!r}")
    if named in ORACLE_DATA:
        section: dict[str, Any] = {"type": named}
    elif named in mappings:
        section = {"type": "hub", "mapping": named}
    elif named.count("/") == 1 and may_be_hub_id(named) and not path.suffix:
        section = {"type": "hub", "path": named, "pool": "train"}
        section |= {"columns": settings} if settings else {}
    else:
        generated = ", ".join((*ORACLE_DATA, *sorted(mappings)))
        raise DataError(
            f"--data {named}: no such file; name a {KINDS}, the id of a hub data set, or one of "
            f"{generated}"
        )
    task = _read(section, model_folder)
    verifier = getattr(_config(section), "verifier", None) or mappings.get(named, {}).get(
        "verifier"
    )
    return ProblemChoice(section, task, is_math=verifier in ("math", "chain_sums"))


def _columns(settings: Sequence[str]) -> dict[str, str]:
    columns: dict[str, str] = {}
    for setting in settings:
        name, equals, column = setting.partition("=")
        if not (equals and column.strip()) or name.strip() not in Columns.model_fields:
            raise RecipeError(
                f"--column {setting!r}: write one of {', '.join(Columns.model_fields)}, an equals sign "
                "and the name of the column, for example --column question=body"
            )
        columns[name.strip()] = column.strip()
    return columns


def _files(
    path: Path, test: str | None, columns: dict[str, str], model_folder: str
) -> ProblemChoice:
    if not path.exists():
        raise DataError(f"--data {path}: no such file")
    sources = _sources(path)
    if test is not None:
        sources["test"] = Path(test).expanduser()
        if not sources["test"].exists():
            raise DataError(f"--test {test}: no such file")
    reasons: dict[str, str] = {}
    rows = list(islice(read_rows(sources["pool"]), SAMPLED_ROWS))
    if not rows:
        raise DataError(f"{path}: the problem set is empty")
    columns = _with_forms(rows, columns, reasons)
    section: dict[str, Any] = {"type": "files", **{k: str(v) for k, v in sources.items()}}
    if columns:
        section["columns"] = columns
    answers = _answers(rows, columns)
    looks_like_math = _share(answers, _is_quantity) >= MOST
    section["verifier"] = "exact"
    reasons["verifier"] = "answers are compared as text"
    if looks_like_math and importlib.util.find_spec("math_verify"):
        section["verifier"], reasons["verifier"] = "math", "answers are numbers or formulas"
    elif looks_like_math:
        reasons["verifier"] = (
            "answers look like mathematics: pip install 'selfteach[math]', then \"math\""
        )
    section = _split(section, model_folder)
    return ProblemChoice(
        section, _read(section, model_folder), section["verifier"] == "math", reasons
    )


def _sources(path: Path) -> dict[str, Path]:
    """Return the pool, and the files of the other splits where a saved data set has them."""
    splits = {child.parent.name: child.parent for child in path.glob("*/state.json")}
    if not (path / "dataset_dict.json").is_file() or not splits:
        return {"pool": path}
    others = {name: splits[name] for name in ("validation", "test") if name in splits}
    training = [folder for name, folder in splits.items() if name not in others]
    return {"pool": splits.get("train", training[0] if training else path), **others}


def _split(section: Mapping[str, Any], model_folder: str) -> dict[str, Any]:
    """Return the section with its pool split: a tenth each where no file is named, and not too many."""
    section = dict(section)
    largest = {"validation": LARGEST_VALIDATION, "test": LARGEST_TEST}
    absent = [name for name in largest if name not in section]
    if not absent:
        return {"train" if key == "pool" else key: value for key, value in section.items()}
    whole = {**section, "split": {"validation": 0, "test": 0}}
    count = len(_read(whole, model_folder).train)
    if count <= len(absent):
        raise DataError(
            f"{section['pool']}: {count} {'problem is' if count == 1 else 'problems are'} too few: one "
            f"is needed to train on, and one each for {' and '.join(absent)}"
        )
    sizes = {name: max(1, min(largest[name], count // 10)) for name in absent}
    return {**section, "split": {**dict.fromkeys(largest, 0), **sizes}}


def _with_forms(
    rows: Sequence[Row], columns: Mapping[str, str], reasons: dict[str, str]
) -> dict[str, str]:
    """Return columns with rules for answers at the end of a worked solution (``#### 72``, a box)."""
    chosen = dict(columns)
    try:
        column = recognised(rows[0], validate(Columns, chosen)).answer
    except MissingValue as missing:
        raise DataError(_as_options(f"{rows[0].where}: {missing}")) from None
    if "|" in column or "answer" in chosen:
        return chosen
    answers = _answers(rows, chosen)
    for form, (answer_rule, reference_rule) in FORMS.items():
        if _share(answers, lambda answer, form=form: form in answer) < MOST:
            continue
        if _share(answers, lambda answer: len(answer) > 40) < 0.5:
            continue  # a bare answer in a box, which verifiers read
        chosen["answer"] = f"{column} | {answer_rule}"
        chosen.setdefault("reference", f"{column} | {reference_rule}" if reference_rule else column)
        reasons["columns"] = f"the column {column!r} holds a solution that ends in its answer"
        break
    return chosen


def _answers(rows: Sequence[Row], columns: Mapping[str, str]) -> list[str]:
    """Return the answers of the rows that have one."""
    answers = []
    for row in rows:
        try:
            answers.append(problem_from(row, validate(Columns, columns)).answer)
        except MissingValue:
            continue
    return answers


def _share(answers: Sequence[str], holds: Any) -> float:
    return sum(map(holds, answers)) / len(answers) if answers else 0.0


def _is_quantity(answer: str) -> bool:
    """Return True for an answer that looks like a number or a formula, and not like words."""
    return bool(QUANTITY.search(answer.strip())) and not WORD.search(LATEX.sub("", answer))


def _config(section: Mapping[str, Any]) -> DataConfig:
    values = {"data": dict(section), "train": {"steps": 0}}
    return validate(Recipe, values, where="--data").data


def _read(section: Mapping[str, Any], model_folder: str) -> Task:
    try:
        return load_task(_config(section), model_folder)
    except DataError as error:
        raise DataError(_as_options(str(error))) from None


def _as_options(line: str) -> str:
    """Replace a recipe's setting of a column, in an error, by this command's option."""
    return COLUMN_SETTING.sub(r"--column \1=NAME", line)


def without_overlong(choice: ProblemChoice) -> ProblemChoice:
    """Return the choice with prompts that leave no room left out instead of refused."""
    reasons = {**choice.reasons, "overlong": "some prompts leave no room for an answer"}
    return replace(choice, section={**choice.section, "overlong": "drop"}, reasons=reasons)
