"""Test problem sets from rows: sources, columns, mappings, filters, duplicates, splits, generators."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from decimal import Decimal
from itertools import combinations, permutations
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from selfteach.config.data_section import FilesData, GymData, HubData, Splitting
from selfteach.errors import DataError, RecipeError, SelfteachError
from selfteach.protocols import Verifier
from selfteach.tasks.sources.audit import MAX_CORRUPTIONS, audit, corruptions
from selfteach.tasks.sources.columns import (
    MissingValue,
    column_value,
    problem_from,
    ready_mappings,
    with_mapping,
)
from selfteach.tasks.sources.load import read_file, read_problem_sets
from selfteach.tasks.sources.rows import Row
from selfteach.tasks.sources.splits import disjoint, normalised, split_pool, without_duplicates
from selfteach.tasks.task import Task, check_answers, load_task
from selfteach.types import Problem, Verdict

ROWS = [
    {"question": f"What is {i} + 1?", "answer": f"{i} and 1 make {i + 1}.\n#### {i + 1}"}
    for i in range(30)
]


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def files(**settings: object) -> Task:
    return load_task(FilesData.model_validate({"type": "files", **settings}), "")


def hub(**settings: object) -> Task:
    return load_task(HubData.model_validate({"type": "hub", **settings}), "")


def gym(**settings: object) -> Task:
    sizes = {"train": 4, "validation": 2, "test": 2}
    return load_task(GymData.model_validate({"type": "reasoning_gym", **sizes, **settings}), "")


def questions(task: Task) -> dict[str, set[str]]:
    names = ("train", "validation", "test")
    return {name: {p.question for p in getattr(task, name)} for name in names}


# -- files --------------------------------------------------------------------------------------


def test_every_file_format_gives_the_same_problems(tmp_path: Path) -> None:
    lines = write_jsonl(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "a.json").write_text(json.dumps(ROWS))
    parquet.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    tasks = [
        files(train=str(path), mapping="gsm8k")
        for path in (lines, tmp_path / "a.json", tmp_path / "a.parquet")
    ]
    assert tasks[0].train == tasks[1].train == tasks[2].train
    first = tasks[0].train[0]
    assert (first.place, first.answer, first.references) == (
        "a-1",
        "1",
        {"reference": "0 and 1 make 1."},
    )


def test_an_id_follows_the_content_and_not_the_row(tmp_path: Path) -> None:
    here = files(train=str(write_jsonl(tmp_path / "a.jsonl", ROWS)), mapping="gsm8k").train
    there = files(train=str(write_jsonl(tmp_path / "b.jsonl", ROWS[::-1])), mapping="gsm8k").train
    assert {p.question: p.id for p in here} == {p.question: p.id for p in there}
    assert len({p.id for p in here}) == len(here)


def test_a_file_of_problems_may_repeat_one(tmp_path: Path) -> None:
    row = {"question": "1 + 1", "answer": "2"}
    first, second = read_file(write_jsonl(tmp_path / "a.jsonl", [row, row]))
    assert first.id != second.id and first.question == second.question


def test_a_line_separator_inside_a_string_ends_no_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"question": "one\u2028two", "answer": "3"}\n', encoding="utf-8")
    assert files(train=str(path)).train[0].question == "one\u2028two"


def test_references_and_meta_are_read(tmp_path: Path) -> None:
    row = {"id": 7, "question": "q", "answer": 2.0, "reference": "r", "aligned_reference": "a",
           "meta": {"level": 3}}  # fmt: skip
    (problem,) = files(train=str(write_jsonl(tmp_path / "a.jsonl", [row]))).train
    assert (problem.id, problem.answer, dict(problem.meta)) == ("7", "2", {"level": 3})
    assert problem.references == {"reference": "r", "aligned_reference": "a"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train": "none.jsonl"}, "none.jsonl: no such problem set"),
        ({"train": "none.parquet"}, "none.parquet: no such problem set"),
        ({"train": "none.csv"}, "none.csv: no such problem set"),
        ({"train": "a.xlsx"}, "a problem set is a .jsonl, .json, .csv, .tsv, .parquet or .arrow file"),
        ({"train": "bad.parquet"}, "cannot be read as Parquet"),
        ({"train": "table.json"}, "not a JSON list"),
        ({}, "name a source"),
        ({"train": "a.jsonl", "columns": {"question": "qestion"}},
         "a.jsonl:1: no column 'qestion'; did you mean 'question'?"),
        ({"train": "a.jsonl", "columns": {"reference": "solution"}}, "no column 'solution'"),
        ({"train": "a.jsonl", "columns": {"id": "uuid"}}, "no column 'uuid'"),
        ({"train": "a.jsonl", "columns": {"meta": ["levle"]}}, "no column 'levle'"),
        ({"train": "a.jsonl", "columns": {"answer": "answer | boxed"}}, r"no \boxed{} in it"),
        ({"train": "a.jsonl", "columns": {"answer": "answer | box"}}, "no rule 'box'; rules: after"),
        ({"train": "a.jsonl", "filter": {"lvl": 1}}, "data.filter: no column 'lvl'"),
        ({"train": "a.jsonl", "filter": {"question": "x"}}, "the problem set is empty"),
        ({"train": "a.jsonl", "mapping": "gsm9k"}, "did you mean 'gsm8k'?"),
        ({"pool": "a.jsonl", "split": {"validation": 20, "test": 20}}, "30 problems are too few"),
        ({"train": "empty.jsonl"}, "is empty"),
        ({"train": "a.jsonl", "verifier": "reasoning_gym"}, "'a-1' is not from that source"),
        ({"train": "a.jsonl", "verifier": "lab", "world": "mars"}, "known worlds"),
    ],
)  # fmt: skip
def test_errors_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_jsonl(Path("a.jsonl"), ROWS)
    Path("empty.jsonl").write_text("\n\n")
    Path("bad.parquet").write_text("PAR1 not really")
    Path("table.json").write_text("{}")
    with pytest.raises(SelfteachError) as caught:
        files(**settings)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_filter_limit_and_bad_rows_are_counted(tmp_path: Path) -> None:
    rows = [
        {"question": str(i), "answer": "" if i == 3 else "x", "level": i % 3} for i in range(12)
    ]
    path = str(write_jsonl(tmp_path / "a.jsonl", rows))
    task = files(train=path, filter={"level": [0, 1]}, bad_rows="drop", limit=6)
    assert [p.question for p in task.train] == ["0", "1", "4", "6", "7"]
    assert task.counts == {"rows": 8, "not in data.filter": 2, "bad rows": 1}
    with pytest.raises(DataError, match=r"a\.jsonl:4: the answer is empty"):
        files(train=path, filter={"level": [0, 1]})
    with pytest.raises(DataError, match="no column 'anser'; did you mean 'answer'"):
        files(train=path, columns={"answer": "anser"}, bad_rows="drop")


# -- columns ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("a", "x ## y ## z"),
        ("a | after:##", " z"),
        ("a | before:## | before:##", "x "),
        ("b.c.1", "two"),
        ("b.c.-1", "three"),
        ("b.c|first", "one"),
        ("b.c | last", "three"),
        ("b.c | join:; ", "one; two; three"),
        ("s | boxed", r"\frac{1}{2}"),
        ("dotted.name", 5),
        ("{a}!\n{b.c.0} {n} {t}", "x ## y ## z!\none 3 true"),
    ],
)
def test_column_values(column: str, value: object) -> None:
    values = {
        "a": "x ## y ## z",
        "b": {"c": ["one", "two", "three"]},
        "s": r"so \boxed{1}, no: \boxed{\frac{1}{2}}.",
        "dotted.name": 5,
        "n": 3.0,
        "t": True,
    }
    assert column_value(values, column) == value


@pytest.mark.parametrize(
    "column", ["x", "b.d", "b.c.9", "a | after:#", "a | first", "n | boxed", "b | last"]
)
def test_a_missing_column_raises(column: str) -> None:
    with pytest.raises(MissingValue):
        column_value({"a": "x", "b": {"c": [1]}, "n": 1}, column)


DAPO = (
    "Solve the following math problem step by step. The last line of your response should be of the "
    "form Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\nWhat is 1 + "
    '1?\n\nRemember to put your answer on its own line after "Answer:".'
)
SAMPLES: dict[str, tuple[dict, tuple[str, str, str | None]]] = {
    "openmathreasoning": (
        {"problem": "What is 1 + 1?", "expected_answer": "2", "problem_type": "has_answer_extracted",
         "generated_solution": "<think>Hm.</think>\n1 + 1 = \\boxed{2}", "problem_source": "aops",
         "pass_rate_72b_tir": "0.5"},
        ("What is 1 + 1?", "2", "1 + 1 = \\boxed{2}"),
    ),
    "gsm8k": (
        {"question": "What is 1 + 1?", "answer": "1 + 1 = <<1+1=2>>2\n#### 2"},
        ("What is 1 + 1?", "2", "1 + 1 = <<1+1=2>>2"),
    ),
    "math": (
        {"problem": "What is 1 + 1?", "solution": "$\\boxed{2}$.", "level": "Level 1", "type": "A"},
        ("What is 1 + 1?", "2", "$\\boxed{2}$."),
    ),
    "math500": (
        {"problem": "What is 1 + 1?", "solution": "Two.", "answer": "2", "subject": "A", "level": 1,
         "unique_id": "test/1.json"},
        ("What is 1 + 1?", "2", "Two."),
    ),
    "aime24": (
        {"id": 60, "problem": "What is 1 + 1?", "solution": "Two.", "answer": "2"},
        ("What is 1 + 1?", "2", "Two."),
    ),
    "aime25": ({"id": "0", "problem": "What is 1 + 1?", "answer": "2"}, ("What is 1 + 1?", "2", None)),
    "deepscaler": (
        {"problem": "What is 1 + 1?", "answer": "2", "solution": ""},
        ("What is 1 + 1?", "2", None),
    ),
    "dapo": (
        {"prompt": [{"role": "user", "content": DAPO}], "reward_model": {"ground_truth": "2"},
         "extra_info": {"index": "9a9b"}},
        ("What is 1 + 1?", "2", None),
    ),
    "olympiadbench": (
        {"id": 1, "question": "What is 1 + 1?", "solution": ["Two."], "final_answer": ["2"],
         "is_multiple_answer": False, "subfield": "A", "answer_type": "Numerical"},
        ("What is 1 + 1?", "2", "Two."),
    ),
    "mbpp": (
        {"task_id": 2, "text": "Write two.", "code": "def f(): return 2", "test_setup_code": "",
         "test_list": ["assert f() == 2"], "challenge_test_list": []},
        ("Write two.\n\nYour code should pass this test:\nassert f() == 2", "def f(): return 2",
         "def f(): return 2"),
    ),
    "mbpp_sanitized": (
        {"task_id": 2, "prompt": "Write two.", "code": "def f(): return 2", "test_imports": [],
         "test_list": ["assert f() == 2"]},
        ("Write two.\n\nYour code should pass this test:\nassert f() == 2", "def f(): return 2",
         "def f(): return 2"),
    ),
    "humaneval": (
        {"task_id": "HumanEval/2", "prompt": "def f():\n", "canonical_solution": "    return 2",
         "test": "def check(candidate):\n    assert candidate() == 2", "entry_point": "f"},
        ("Complete this function; write all of it.\n\n```python\ndef f():\n\n```",
         "def f():\n    return 2", "def f():\n    return 2"),
    ),
    "livecodebench": (
        {"question_id": "2", "question_content": "Print two.", "starter_code": "",
         "platform": "atcoder", "difficulty": "easy", "contest_date": "2024-01-01", "metadata": "{}",
         "public_test_cases": '[{"input": "", "output": "2", "testtype": "stdin"}]'},
        ("Print two.", "", None),
    ),
}  # fmt: skip


def test_every_ready_mapping_reads_a_row_of_its_kind() -> None:
    assert set(SAMPLES) == set(ready_mappings())
    for name, (values, expected) in SAMPLES.items():
        config = with_mapping(HubData(type="hub", mapping=name))
        assert config.path and any((config.train, config.test, config.pool)), name
        assert config.columns is not None
        problem = problem_from(Row(values, "here", "row"), config.columns)
        assert (problem.question, problem.answer, problem.references.get("reference")) == expected
        assert all(column_value(values, column) == value for column, value in config.filter.items())


def test_the_recipe_s_keys_override_its_mapping() -> None:
    columns = {"answer": "answer | after:####", "meta": ["level"]}
    config = with_mapping(
        HubData.model_validate(
            {"type": "hub", "mapping": "gsm8k", "path": "mine", "train": "all", "columns": columns,
             "verifier": "exact"}
        )
    )  # fmt: skip
    assert (config.path, config.name, config.train, config.pool) == ("mine", None, "all", None)
    assert config.verifier == "exact" and config.columns is not None
    assert config.columns.meta == ("level",)
    assert config.columns.reference == "answer | before:####"


# -- datasets -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a dataset folder as on the hub: train has 20 questions, test repeats five of them."""
    folder = tmp_path_factory.mktemp("hub")
    for name, rows in (("train", ROWS[:20]), ("test", ROWS[15:])):
        parquet.write_table(pa.Table.from_pylist(rows), folder / f"{name}-0.parquet")
    return folder


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_dataset_is_read_by_its_mapping(dataset: Path, streaming: bool) -> None:
    task = hub(path=str(dataset), mapping="gsm8k", streaming=streaming)
    assert len(task.test) == 15 and len(task.train) + len(task.validation) == 15
    assert task.counts == {"rows": 35, "in two sources": 5}
    assert task.test[0].place == "test-1" and task.test[0].answer == "16"


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_saved_dataset_is_read_from_disk(tmp_path: Path) -> None:
    import datasets

    splits = {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS)}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    splits["train"].save_to_disk(tmp_path / "one")
    task = hub(
        path=str(tmp_path / "saved"), train="train", columns={"answer": "answer | after:####"}
    )
    assert len(task.train) == 30 and task.train[3].answer == "4"
    assert len(hub(path=str(tmp_path / "one"), train="train").train) == 30
    with pytest.raises(DataError, match="no split 'trian'; did you mean 'train'"):
        hub(path=str(tmp_path / "saved"), train="trian")


def test_datasets_that_cannot_be_loaded_are_one_line_errors(dataset: Path, tmp_path: Path) -> None:
    for settings, message in [
        ({"path": "nobody/nothing", "train": "train"}, "not in the cache, and the hub cannot"),
        ({"mapping": "gsm8k"}, "openai/gsm8k': not in the cache"),
        ({"path": str(dataset), "train": "trian"}, 'Unknown split "trian"'),
        ({"path": str(dataset), "train": "train", "name": "main"}, "'main' not found"),
        ({"path": str(tmp_path / "nowhere"), "train": "train"}, "cannot be loaded"),
        ({"train": "train"}, "needs a data.path"),
        ({"path": str(dataset)}, "name a source"),
    ]:
        with pytest.raises(SelfteachError) as caught:
            hub(**settings)
        assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("module", "load", "pip"),
    [
        ("datasets", lambda: hub(path="x", train="train"), "selfteach[hub]"),
        ("reasoning_gym.factory", lambda: gym(task="gsm_symbolic"), "selfteach[problems]"),
    ],
)
def test_the_error_for_a_missing_package_names_the_pip_command(
    monkeypatch: pytest.MonkeyPatch, module: str, load: object, pip: str
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DataError, match="pip install") as caught:
        load()  # type: ignore[operator]
    assert pip in str(caught.value)


# -- splits -------------------------------------------------------------------------------------


def pool_of(count: int) -> list[Problem]:
    return [Problem(f"p{i}", f"Question {i}?", str(i)) for i in range(count)]


sizes = st.one_of(
    st.builds(lambda a, b: {"validation": a, "test": b}, st.integers(0, 9), st.integers(0, 9)),
    st.builds(
        lambda a, b: {"validation": a, "test": b}, st.floats(0.01, 0.49), st.floats(0.01, 0.49)
    ),
)


@given(sizes, st.integers(18, 40), st.integers(0, 3), st.randoms())
def test_splits_are_disjoint_and_do_not_depend_on_the_order(
    sizes: dict, count: int, seed: int, shuffle: random.Random
) -> None:
    pool, config = pool_of(count), Splitting(seed=seed, **sizes)
    split = split_pool(pool, config)
    ids = [p.id for problems in split.values() for p in problems]
    assert sorted(ids) == sorted(p.id for p in pool), "each is in one split"
    shuffled = list(pool)
    shuffle.shuffle(shuffled)
    again = split_pool(shuffled, config)
    assert {n: {p.id for p in ps} for n, ps in split.items()} == {
        n: {p.id for p in ps} for n, ps in again.items()
    }
    if isinstance(config.test, int):
        assert len(split["test"]) == config.test and len(split["validation"]) == config.validation


def test_with_shares_a_growing_pool_moves_no_question() -> None:
    config = Splitting(validation=0.2, test=0.3)
    small, large = split_pool(pool_of(200), config), split_pool(pool_of(1000), config)
    for name, problems in small.items():
        assert {p.id for p in problems} <= {p.id for p in large[name]}
    assert 240 < len(large["test"]) < 360 and 140 < len(large["validation"]) < 260
    assert split_pool(pool_of(200), Splitting(seed=1, validation=0.2, test=0.3)) != small


@pytest.mark.parametrize("sizes", [{"validation": 4, "test": 6}, {"validation": 0.2, "test": 0.3}])
def test_no_two_splits_share_a_value_of_the_column_that_splits(sizes: dict) -> None:
    pool = [replace(p, meta={"doc": {"id": i // 4}}) for i, p in enumerate(pool_of(80))]
    split = split_pool(pool, Splitting(by="meta.doc.id", **sizes))
    groups = {name: {p.meta["doc"]["id"] for p in problems} for name, problems in split.items()}
    assert all(groups.values())
    for one, other in combinations(groups.values(), 2):
        assert not one & other
    if isinstance(sizes["test"], int):
        assert [len(split[name]) for name in ("test", "validation")] == [6, 4]
        assert len(split["train"]) == 80 - 8 - 4, "what is left of a document is in no split"
    else:
        assert sum(map(len, split.values())) == 80
    with pytest.raises(DataError, match=r"split\.by.*document"):
        split_pool(pool, Splitting(by="meta.document", **sizes))


def test_files_are_split_by_a_column(tmp_path: Path) -> None:
    rows = [{"question": f"q{i}", "answer": str(i), "page": i // 5} for i in range(50)]
    (tmp_path / "pool.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = FilesData(
        type="files",
        pool=str(tmp_path / "pool.jsonl"),
        split=Splitting(by="page", validation=5, test=5),
    )
    splits, _, _ = read_problem_sets(config)
    assert {len({int(p.answer) // 5 for p in splits[n]}) for n in ("validation", "test")} == {1}
    assert len(splits["train"]) == 40 and not splits["train"][0].columns


def test_the_papers_counts() -> None:
    split = split_pool(pool_of(400), Splitting(train=282, validation=0, test=30))
    assert {name: len(problems) for name, problems in split.items()} == {
        "test": 30,
        "validation": 0,
        "train": 282,
    }


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"validation": 10, "test": 0.1}, "all as counts or all as shares"),
        ({"validation": 0.6, "test": 0.6}, "add up to 1.2"),
        ({"validation": -1}, "validation"),
    ],
)
def test_invalid_split_sizes_raise(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Splitting.model_validate(settings)


def test_duplicates_are_the_same_question_up_to_white_space() -> None:
    assert normalised("  What  is\n½? ") == normalised("What is ½?") != normalised("What is 2?")
    assert normalised("caf\u00e9") == normalised("cafe\u0301")
    twice = [Problem("a", "What is x?", "1"), Problem("b", "What is  x?", "1")]
    unique, duplicates = without_duplicates(twice)
    assert [p.id for p in unique] == ["a"] and duplicates == 1


@pytest.mark.parametrize(
    ("one", "other"),
    [("7²?", "72?"), ("What is A + a?", "What is a + A?"), ("x₁ + 1", "x1 + 1"), ("½", "1⁄2"),
     ("Is ℝ open?", "Is R open?"), ("2⁵", "25"), ("ﬁ", "fi"), ("MB", "mb"), ("Ⅷ", "VIII")],
)  # fmt: skip
def test_other_mathematics_is_another_question(one: str, other: str, tmp_path: Path) -> None:
    assert normalised(one) != normalised(other)
    rows = [{"question": one, "answer": "1"}, {"question": other, "answer": "2"}]
    assert len(files(train=str(write_jsonl(tmp_path / "a.jsonl", rows))).train) == 2
    for name, row in zip(("train", "test"), rows, strict=True):
        write_jsonl(tmp_path / f"{name}.jsonl", [row])
    task = files(train=str(tmp_path / "train.jsonl"), test=str(tmp_path / "test.jsonl"))
    assert (len(task.train), len(task.test)) == (1, 1)
    assert task.counts["in train and spelled alike in validation or test"] == 1


def test_spellings_of_one_question_stay_in_one_split_of_a_pool() -> None:
    pool = pool_of(200)
    shouted = [Problem(f"{p.id}-b", p.question.upper(), p.answer) for p in pool]
    split = split_pool([*pool, *shouted], Splitting(validation=0.2, test=0.3))
    names = {p.id: name for name, problems in split.items() for p in problems}
    assert all(names[p.id] == names[f"{p.id}-b"] for p in pool)


def test_a_question_of_two_sources_stays_in_test() -> None:
    q = {name: Problem(name, "the same", "1") for name in ("train", "validation", "test", "pool")}
    splits, shared = disjoint({name: [problem] for name, problem in q.items()})
    assert splits == {"test": [q["test"]], "validation": [], "train": [], "pool": []}
    assert shared == 3


# -- reasoning-gym ------------------------------------------------------------------------------


def test_a_generator_gives_disjoint_problems_with_its_worked_solutions() -> None:
    task = gym(task="gsm_symbolic", seed=3)
    assert [len(s) for s in (task.train, task.validation, task.test)] == [4, 2, 2]
    assert task.train == gym(task="gsm_symbolic", seed=3).train
    assert task.train != gym(task="gsm_symbolic", seed=4).train
    first = task.train[0]
    assert f"#### {first.answer}" in first.references["reference"]


def test_two_seeds_of_a_generator_share_no_question_between_train_and_test() -> None:
    few = {"min_terms": 2, "max_terms": 2, "max_digits": 1}  # so few that seeds do share questions
    first, second = (
        questions(gym(task="chain_sum", config=few, train=60, test=8, seed=seed)) for seed in (0, 5)
    )
    assert first["train"] & second["train"] and first["train"] != second["train"]
    assert not first["train"] & second["test"] and not first["test"] & second["train"]


def templates_of(task: Task) -> dict[str, set[int]]:
    return {
        name: {p.meta["reasoning_gym"]["metadata"]["template"] for p in getattr(task, name)}
        for name in ("train", "validation", "test")
    }


def test_no_template_of_a_generator_is_in_two_splits_whatever_the_seed() -> None:
    first, second = (
        templates_of(
            gym(
                task="gsm_symbolic",
                split_by="template",
                train=300,
                validation=40,
                test=80,
                seed=seed,
            )
        )
        for seed in (0, 5)
    )
    assert [len(first[name]) for name in ("train", "validation", "test")] == [65, 6, 14]
    for name, other in permutations(first, 2):
        assert not first[name] & first[other] and not first[name] & second[other]
    by_question = templates_of(gym(task="gsm_symbolic", train=300, test=80))
    assert by_question["train"] & by_question["test"], (
        "the questions differ, their templates do not"
    )


def test_the_template_of_an_entry_decides_its_words() -> None:
    """Problems of one template have the same variables, and of two templates other ones."""
    variables: dict[int, set[tuple[str, ...]]] = {}
    for problem in gym(task="gsm_symbolic", train=300).train:
        metadata = problem.meta["reasoning_gym"]["metadata"]
        variables.setdefault(metadata["template"], set()).add(tuple(sorted(metadata["variables"])))
    assert all(len(names) == 1 for names in variables.values())
    assert len(set().union(*variables.values())) == len(variables) > 80


def test_a_split_by_any_value_of_the_metadata() -> None:
    task = gym(task="leg_counting", split_by="num_animals", config={"max_animals": 30}, train=60)
    numbers = {
        name: {p.meta["reasoning_gym"]["metadata"]["num_animals"] for p in getattr(task, name)}
        for name in ("train", "validation", "test")
    }
    assert all(not numbers[name] & numbers[other] for name, other in permutations(numbers, 2))


def test_reference_path_and_one_of_many_right_answers() -> None:
    task = gym(task="propositional_logic", reference="example_answer")
    assert all(p.answer == p.references["reference"] for p in task.train)
    assert not any(f.kind == "rejected" for f in check_answers(task).findings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "gsm_symbolc"}, "data.task = 'gsm_symbolc'; did you mean 'gsm_symbolic'?"),
        ({"task": "chain_sum", "config": {"min_term": 2}}, "did you mean 'min_terms'?"),
        ({"task": "chain_sum", "config": {"min_terms": 0}}, "data.config of 'chain_sum': "),
        ({"task": "chain_sum", "config": {"seed": 1}}, "set data.seed"),
        ({"task": "gsm_symbolic", "reference": "cot"}, "data.reference of 'gsm_symbolic'"),
        ({"task": "gsm_symbolic", "split_by": "kind"}, "data.split_by of 'gsm_symbolic'"),
        ({"task": "aiw", "split_by": "task_type"}, "another data.split_by than 'task_type'"),
        ({"task": "chain_sum", "train": 500,
          "config": {"max_terms": 2, "min_terms": 2, "max_digits": 1}}, "too few distinct questions"),
    ],
)  # fmt: skip
def test_errors_of_a_generator_are_one_line(settings: dict, message: str) -> None:
    with pytest.raises((RecipeError, DataError)) as caught:
        gym(**settings)
    assert message in str(caught.value) and "\n" not in str(caught.value)


# -- the audit ----------------------------------------------------------------------------------


def test_invalid_problems_are_named_dropped_or_refused(tmp_path: Path) -> None:
    rows = [{"question": f"{i}?", "answer": str(i)} for i in range(5)]
    rows[2]["answer"] = "</answer>"  # ends the tag it stands in
    path = str(write_jsonl(tmp_path / "a.jsonl", rows))
    result = check_answers(files(train=path))
    assert result.checked == 5
    assert [str(f) for f in result.findings] == [
        "problem 'a-3': the verifier rejected the gold answer '</answer>'"
    ]
    dropped = files(train=path, invalid_problems="drop")
    assert len(dropped.train) == 4 and dropped.counts["invalid_problems"] == 1
    with pytest.raises(DataError, match="problem 'a-3'"):
        files(train=path, invalid_problems="stop")


def test_the_audit_detects_a_verifier_that_accepts_everything() -> None:
    result = audit(pool_of(3), lambda problem, text: Verdict(True, True, text), str)
    assert [f.kind for f in result.findings] == ["accepted"] * 3 and result.invalid_problems == {
        "Question 0?",
        "Question 1?",
        "Question 2?",
    }


def test_the_audit_changes_every_number_and_tries_every_part(tmp_path: Path) -> None:
    gold = r"7 \text{ hours } 30 \text{ minutes}"
    problem = Problem("p", "q", gold)
    for read in (lambda t: t[:1], lambda t: t[-12:], lambda t: t.split()[0], lambda t: "7" in t):
        verify = accepts_if(lambda text, read=read: read(text) == read(gold))
        assert [f.kind for f in audit([problem], verify, str).findings] == ["accepted"]
    assert not audit([problem], accepts_if(lambda text: text == gold), str).findings
    path = write_jsonl(tmp_path / "a.jsonl", [{"question": "q", "answer": gold}])
    assert not check_answers(files(train=str(path), verifier="math")).findings


def accepts_if(accept: Callable[[str], bool]) -> Verifier:
    return lambda problem, text: Verdict(accept(text), True, text)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (r"7 \text{ hours } 30 \text{ minutes}",
         {r"8 \text{ hours } 30 \text{ minutes}", r"7 \text{ hours } 40 \text{ minutes}",
          "7 hours", "30 minutes", "7", "30"}),
        ("5, 7", {"6, 7", "5, 8", "5", "7"}),
        ("(1,2)", {"(2,2)", "(1,3)", "1", "2"}),
        (r"5 \text{ and } 7", {r"6 \text{ and } 7", r"5 \text{ and } 8", "5", "7"}),
        ("1,234", {"2,234"}),
        ("A, C", {"A, D", "A", "C"}),
        ("Tuesday", {"Tuesdaz"}),
        ("?!", {"?!1"}),
    ],
)  # fmt: skip
def test_corruptions(answer: str, expected: set[str]) -> None:
    assert set(corruptions(answer)) == expected


@given(st.text(min_size=1))
def test_a_corruption_is_another_answer(answer: str) -> None:
    corrupted = list(corruptions(answer))
    assert 1 <= len(corrupted) <= MAX_CORRUPTIONS and answer not in corrupted


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1e-5, "0.00001"), (2.0**70, str(2**70)), (0.1, "0.1"), (-2.5, "-2.5"), (3.0, "3"),
        (1e22, "1" + "0" * 22), (Decimal("1.50"), "1.5"), (Decimal("1E+3"), "1000"), (-0.0, "0"),
        (True, "true"), (7, "7"), (date(2025, 1, 2), "2025-01-02"),
    ],
)  # fmt: skip
def test_numbers_are_written_out(value: object, text: str, tmp_path: Path) -> None:
    table = pa.Table.from_pylist([{"question": "q", "answer": value}])
    parquet.write_table(table, tmp_path / "a.parquet")
    assert files(train=str(tmp_path / "a.parquet")).train[0].answer == text


def test_a_narrow_float_is_its_shortest_number(tmp_path: Path) -> None:
    table = pa.table({"question": ["q", "r"], "answer": pa.array([0.1, 2.5], pa.float32())})
    parquet.write_table(table, tmp_path / "a.parquet")
    assert [p.answer for p in files(train=str(tmp_path / "a.parquet")).train] == ["0.1", "2.5"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (float("nan"), "the answer is nan, not a number"),
        (float("inf"), "the answer is inf, not a number"),
        ([1, 2], "the answer is a list, not a text: name one element"),
        ([5], "the answer is a list"),
        ({"value": 5}, "the answer is a table"),
        (b"5", "the answer is a bytes"),
        ("NaN", "the answer is 'NaN', what a table writes"),
    ],
)  # fmt: skip
def test_a_gold_answer_that_is_no_text_is_refused(
    value: object, message: str, tmp_path: Path
) -> None:
    columns = {"question": ["q", "r"], "answer": [value, value]}
    parquet.write_table(pa.table(columns), tmp_path / "a.parquet")
    with pytest.raises(DataError) as caught:
        files(train=str(tmp_path / "a.parquet"))
    assert f"a.parquet: row 1: {message}" in str(caught.value) and "\n" not in str(caught.value)


def test_a_column_that_is_no_text_and_that_no_recipe_names_is_left_out(tmp_path: Path) -> None:
    row = {"question": "q", "answer": "2", "reference": ["a", "b"], "id": [1]}
    (problem,) = files(train=str(write_jsonl(tmp_path / "a.jsonl", [row]))).train
    assert problem.references == {} and problem.place == "a-1"
    with pytest.raises(DataError, match="column 'reference' is a list, not a text"):
        files(train=str(tmp_path / "a.jsonl"), columns={"reference": "reference"})
