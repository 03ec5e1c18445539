"""Test that TRL's and verl's columns are recognised, conversations among them, or named in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfteach.config.data_section import Columns, FilesData
from selfteach.errors import DataError
from selfteach.tasks.sources.columns import problem_from
from selfteach.tasks.sources.rows import Row
from selfteach.tasks.task import Task, describe_problems, load_task
from selfteach.types import Problem

SYSTEM = {"role": "system", "content": "Be brief."}
HI, HELLO = {"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}
ASK = {"role": "user", "content": "What is 1 + 1?"}


def read(values: dict[str, Any], **columns: Any) -> Problem:
    return problem_from(Row(values, "a.jsonl:1", "a-1"), Columns.model_validate(columns))


def files(path: Path, **recipe: object) -> Task:
    config = {"type": "files", "train": str(path), **recipe}
    return load_task(FilesData.model_validate(config), "")


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def loading(path: Path, **recipe: object) -> str:
    """Return the one-line error of a file that cannot be loaded."""
    with pytest.raises(DataError) as caught:
        files(path, **recipe)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("prompt", ["prompt", "problem", "question"])
@pytest.mark.parametrize(
    "answer", ["answer", "solution", "ground_truth", "final_answer", "expected_answer"]
)
def test_the_usual_names_are_recognised(prompt: str, answer: str) -> None:
    problem = read({prompt: "What is 1 + 1?", answer: "2"})
    assert (problem.question, problem.answer, problem.history) == ("What is 1 + 1?", "2", ())
    assert problem.id == read({"question": "What is 1 + 1?", "answer": "2"}).id


def test_a_row_of_verl_is_recognised() -> None:
    problem = read(
        {
            "data_source": "mine", "prompt": [SYSTEM, ASK], "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": "2"}, "extra_info": {"index": 3},
        }
    )  # fmt: skip
    assert (problem.question, problem.answer) == ("What is 1 + 1?", "2")
    assert problem.history == (("system", "Be brief."),)


def test_a_solution_beside_an_answer_is_the_reference() -> None:
    worked = "3 * 4 = 12. 12 - 5 = 7."
    problem = read({"prompt": "q", "solution": worked, "answer": "7"})
    assert problem.answer == "7" and problem.references == {"reference": worked}
    for row in ({"solution": " 7", "answer": "7"}, {"solution": 7, "answer": 7}, {"solution": ""}):
        problem = read({"prompt": "q", "answer": "7", **row})
        assert problem.answer == "7" and not problem.references
    assert not read({"prompt": "q", "solution": "7"}, answer="solution").references
    named = read({"prompt": "q", "solution": worked, "answer": "7", "reference": "r"})
    assert named.references == {"reference": "r"}


def test_a_worked_solution_gives_the_content_of_its_box_and_is_the_reference() -> None:
    worked = r"One and one make two, so $\boxed{1}$, no: $\boxed{2}$."
    problem = read({"prompt": "q", "solution": worked})
    assert (problem.answer, problem.references) == ("2", {"reference": worked})
    for answer in (r"\boxed{2}", r"$\boxed{2}$", "2"):
        problem = read({"prompt": "q", "solution": answer})
        assert (problem.answer, problem.references) == ("2", {}), answer
    other = read({"prompt": "q", "solution": worked, "reference": "r"})
    assert other.references == {"reference": "r"}


@pytest.mark.parametrize(
    ("messages", "history"),
    [
        ([ASK], ()),
        ([SYSTEM, ASK], (("system", "Be brief."),)),
        ([{**SYSTEM, "role": "developer"}, ASK], (("system", "Be brief."),)),
        ([SYSTEM, SYSTEM, ASK], (("system", "Be brief.\n\nBe brief."),)),
        ([SYSTEM, HI, HELLO, ASK],
         (("system", "Be brief."), ("user", "Hi."), ("assistant", "Hello."))),
        ([{"role": "user", "content": [{"type": "text", "text": "What is "},
                                       {"type": "text", "text": "1 + 1?"}]}], ()),
        ([{**ASK, "tool_calls": None, "name": None}], ()),
    ],
)  # fmt: skip
def test_a_list_of_messages_is_a_question_and_what_precedes_it(
    messages: list[dict[str, Any]], history: tuple[tuple[str, str], ...]
) -> None:
    for name in ("prompt", "messages", "question"):
        problem = read({name: messages, "answer": "2"})
        assert (problem.question, problem.history) == ("What is 1 + 1?", history)
    assert read({"x": messages, "answer": "2"}, question="x") == problem


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([HI, HELLO], "the prompt ends in a message of the assistant"),
        ([SYSTEM], "the prompt ends in a message of the system"),
        ([HI, HELLO, SYSTEM, ASK], "the prompt has a system message after the first turn"),
        ([{"role": "tool", "content": "5"}, ASK], "a message of the role 'tool'; roles: system"),
        ([HI, {**HELLO, "tool_calls": [{"name": "f"}]}, ASK], "a message that calls a tool"),
        ([{"role": "user", "content": [{"type": "image", "image": "x"}]}], "without images"),
        ([{"role": "user", "content": None}], "content is no text"),
        ([{"role": "user", "content": " "}], "the question is empty"),
        ([{"from": "human", "value": "?"}], "the question is a list, not a text"),
        ([], "the question is a list, not a text"),
    ],
)  # fmt: skip
def test_messages_that_are_no_prompt_are_one_line(
    messages: list[dict[str, Any]], message: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "a.jsonl", {"prompt": messages, "answer": "2"})
    assert message in loading(path)


@pytest.mark.parametrize(
    ("row", "columns", "message"),
    [
        ({"text": "q", "label": 1}, {},
         "no column 'question' (nor prompt, problem or messages); the columns are 'text', 'label': "
         'name the one of the question, data.columns.question = "…"'),
        ({"prompt": "q", "label": 1}, {}, "no column 'answer' (nor final_answer, expected_answer"),
        ({"prompt": "q", "label": 1}, {"answer": "lable"}, "did you mean 'label'?"),
        ({"prompt": "q", "reward_model": {"style": "rule"}}, {}, "no column 'answer'"),
        ({"question": "q", "answer": "1", "turns": "x"}, {"history": "turns"},
         "the history is no list of messages"),
        ({"question": [SYSTEM, ASK], "answer": "1", "history": [HI, HELLO]}, {},
         "a system message after the messages of the history"),
    ],
)  # fmt: skip
def test_columns_that_are_not_recognised_are_named_with_what_there_is(
    row: dict[str, Any], columns: dict[str, str], message: str, tmp_path: Path
) -> None:
    assert message in loading(write(tmp_path / "a.jsonl", row), columns=columns)


def test_check_says_which_columns_were_read_and_which_prompt_was_not(tmp_path: Path) -> None:
    row = {"prompt": [ASK], "solution": r"It is $1 + 1 = \boxed{2}$, as we know."}
    lines = list(describe_problems(files(write(tmp_path / "a.jsonl", row))))
    assert (
        "columns: question from prompt, answer from solution | boxed, reference from solution"
        in lines
    )
    row = {"question": "q", "prompt": [SYSTEM, ASK], "answer": "2"}
    task = files(write(tmp_path / "a.jsonl", row))
    assert task.columns == "question from question, answer from answer; not read: prompt"
    assert task.train[0].question == "q"


def test_conversations_survive_every_format(tmp_path: Path) -> None:
    rows = [{"prompt": [SYSTEM, HI, HELLO, ASK], "ground_truth": "2"}, {"prompt": [ASK, HELLO, HI],
            "ground_truth": "it's"}]  # fmt: skip
    frame, dataset = pd.DataFrame(rows), datasets.Dataset.from_list(rows)
    datasets.disable_progress_bars()
    write(tmp_path / "a.jsonl", *rows)
    frame.to_parquet(tmp_path / "a.parquet")
    frame.to_csv(tmp_path / "python.csv", index=False)
    frame.assign(prompt=frame["prompt"].map(json.dumps)).to_csv(tmp_path / "json.csv")
    dataset.save_to_disk(tmp_path / "saved")
    expected = files(tmp_path / "a.jsonl").train
    assert expected[1].history == (("user", "What is 1 + 1?"), ("assistant", "Hello."))
    for name in ("a.parquet", "python.csv", "json.csv", "saved"):
        assert files(tmp_path / name).train == expected, name


def test_a_question_in_two_conversations_is_two_problems_and_under_two_systems_in_one_split(
    tmp_path: Path,
) -> None:
    later = {"role": "user", "content": "And now?"}
    rows = [
        {"prompt": [HI, HELLO, later], "answer": "1"},
        {"prompt": [ASK, HELLO, later], "answer": "2"},
    ]
    task = files(write(tmp_path / "a.jsonl", *rows))
    assert len({p.id for p in task.train}) == 2 and task.counts == {"rows": 2}
    train = write(tmp_path / "train.jsonl", {"prompt": [SYSTEM, *rows[0]["prompt"]], "answer": "1"},
                  rows[1])  # fmt: skip
    test = write(tmp_path / "test.jsonl", rows[0])
    task = files(train, test=str(test))
    assert [p.answer for p in task.train] == ["2"] and task.counts["in two sources"] == 1


messages = st.lists(
    st.tuples(st.sampled_from(["user", "assistant"]), st.text(max_size=8)), max_size=4
)


@given(messages, st.text(min_size=1, max_size=8).filter(lambda t: t.strip() == t != "nan"))
def test_a_history_and_a_question_are_the_conversation_that_they_make(
    turns: list[tuple[str, str]], question: str
) -> None:
    earlier = [{"role": role, "content": content} for role, content in turns]
    whole = read({"prompt": [*earlier, {"role": "user", "content": question}], "answer": "1"})
    parts = read({"history": earlier, "question": question, "answer": "1"})
    assert whole == parts and whole.history == tuple(turns)


def test_a_column_history_that_holds_no_messages_is_left_alone() -> None:
    assert read({"question": "q", "answer": "1", "history": "of Rome"}).history == ()
