"""`selfteach critique` critiques completions from a file and prints statistics and examples."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from command_line import Call, served_critic_recipe
from model_families import byte_level
from scripted_server import refuses, says, serving

from selfteach.config.recipe import Recipe
from selfteach.config.schema import validate
from selfteach.tasks import chain_sums
from selfteach.trainer.loop import run_to_end

CRITIC = "max_tokens = 64\nhttp_retries = 0\nmax_attempts = 1\nprice_prompt = 1000"


def trace(*steps: str, answer: str) -> str:
    numbered = [f"<step_{i}>{step}</step_{i}>" for i, step in enumerate(steps, start=1)]
    return "\n".join([*numbered, f"<answer>{answer}</answer>"])


RIGHT = trace("Three bags of four are 12.", "12 less 2 is 10.", answer="10")
WRONG = trace("Three bags of four are 12.", "12 less 2 is 9.", answer="9")
HOSTILE = (
    "\x1b[2J\x1b]0;owned\x07[bold]I like[/bold] <script>alert(1)</script>\u202e {{ turn }} ==="
)

# Question: the completion, and the critic's reply.
COMPLETIONS = {
    "right and repeated": (RIGHT, RIGHT),
    "right and changed": (RIGHT, RIGHT.replace("12 less 2 is 10", "12 take away 2 is 10")),
    "wrong and corrected": (WRONG, RIGHT),
    "wrong and repeated": (WRONG, WRONG),
    "wrong and liked": (WRONG, HOSTILE),
}  # fmt: skip


def replies(body: dict[str, Any]) -> str:
    prompt = body["messages"][-1]["content"]
    return next(reply for question, (_, reply) in COMPLETIONS.items() if question in prompt)


@pytest.fixture(autouse=True)
def _columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")


@pytest.fixture
def completions(tmp_path: Path) -> Path:
    path = tmp_path / "completions.jsonl"
    rows = [
        {"id": f"p{i}", "question": question, "text": text, "answer": "10"}
        for i, (question, (text, _)) in enumerate(COMPLETIONS.items())
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def recipe(tmp_path: Path, url: str) -> Path:
    model = tmp_path / "only a tokenizer"
    byte_level().save_pretrained(model)
    return served_critic_recipe(
        tmp_path / "recipe.toml",
        model=model,
        url=url,
        cache=tmp_path / "store.sqlite",
        critic=CRITIC,
    )


def line(printed: str, begin: str) -> str:
    (match,) = [row for row in printed.splitlines() if row.strip().startswith(begin)]
    return " ".join(match.split())


def test_a_critic_is_compared_with_the_program_that_checks_every_step(
    tmp_path: Path, call: Call
) -> None:
    problems = chain_sums.problem_sets(
        seed=0, min_terms=3, max_terms=3, max_digits=1, train=4, validation=1, test=1
    )[0]
    right = [problem.references["aligned_reference"] for problem in problems]
    wrong = [re.sub(r"(\d+)\nAnswer", r"\g<1>0\nAnswer", text) for text in right[1:]]  # second line
    texts = [right[0], *wrong]
    path, model = tmp_path / "completions.jsonl", tmp_path / "only a tokenizer"
    path.write_text("".join(
        json.dumps({"question": p.question, "text": text, "answer": p.answer}) + "\n"
        for p, text in zip(problems, texts, strict=True)
    ))  # fmt: skip
    byte_level().save_pretrained(model)
    recipe_path = tmp_path / "recipe.toml"
    recipe_path.write_text(
        f'model = {{ path = "{model}" }}\n'
        'data = { type = "chain_sums", seed = 0, min_terms = 3, max_terms = 3, max_digits = 1, '
        "train = 4, validation = 1, test = 1 }\n"
        'critic = { type = "oracle" }\ncontext = { type = "step_aligned" }\n'
    )
    out = tmp_path / "critiques.jsonl"
    status, printed, errors = call("critique", path, "--recipe", recipe_path, "--out", out)
    assert (status, errors) == (0, "")
    assert "3 100% [44%, 100%]" in line(printed, "the first wrong step is changed first")
    assert "0 0% [0%, 79%] 1 of these" in line(printed, "a step is changed all the same")
    rows = [json.loads(row) for row in out.read_text().splitlines()]
    assert [row["true_first_error"] for row in rows] == [None, 1, 1, 1]


def test_statistics_and_critiques_of_completions_from_a_file(
    tmp_path: Path, completions: Path, call: Call
) -> None:
    with serving(says(replies)) as server:
        path, out = recipe(tmp_path, server.url), tmp_path / "critiques.jsonl"
        status, printed, errors = call(
            "critique", completions, "--recipe", path, "--out", out, "--show", 5
        )
        assert (status, errors) == (0, "") and len(server.requests) == 5
        rows_printed = [" ".join(row.split()) for row in printed.splitlines()]
        for label, numbers in {
            "case A: all right": "1 20%",
            "case B: right, something was missing": "1 20%",
            "case D: wrong": "1 20%",
            "malformed:": "1 20%",
            "wrong_answer:": "1 20%",
            "the critic's": "3 60% 5 all rollouts",
            "false alarms:": "1 50% 2 correct rollouts",
            "correct rollouts with": "0 0% 2 correct rollouts",
            "misses:": "1 33% 3 incorrect rollouts",
            "requests": "sent 5 1.0",
            "replies from the cache": "0 0.0",
            "prompt tokens": "100 20.0",
            "": "35 7.0",  # completion tokens
            "cost": "0.1000 0.0200",
            "nowhere": "1 ##########",
            "step 2": "2 ####################",
        }.items():
            assert any(row.startswith(label) and row.endswith(numbers) for row in rows_printed), (
                printed
            )
        # A step of the completion, its status, the critique's step; the final answer last.
        assert re.search(r"12 less 2 is 9\. +fixed +12 less 2 is 10\.", printed)
        assert re.search(r"Three bags of four are 12\. +kept +Three bags of four are 12\.", printed)
        assert re.search(r"\n +9 +fixed +10 *\n", printed)
        assert printed.count("the rollout is ") == 5
        rows = [json.loads(row) for row in out.read_text().splitlines()]
        assert [row["problem_id"] for row in rows] == ["p0", "p1", "p2", "p3", "p4"]
        assert [row["critique"].get("case") for row in rows[:3]] == ["A", "B", "D"]
        assert rows[2]["critique"]["first_error"] == 1 and rows[2]["first_change"]["step"] == 1
        _, again, _ = call("critique", completions, "--recipe", path)
        assert len(server.requests) == 5, "cached replies are not requested again"
        assert "the cache 5 1.0" in line(again, "replies from")
        assert "sent 0 0.0" in line(again, "requests")
        assert again.count("the rollout is ") == 4


def test_control_characters_of_models_are_not_printed(
    tmp_path: Path, completions: Path, call: Call
) -> None:
    with serving(says(HOSTILE)) as server:
        rows = [json.loads(row) for row in completions.read_text().splitlines()]
        rows[0] |= {"question": f"q {HOSTILE}", "text": HOSTILE, "id": HOSTILE}
        completions.write_text("".join(json.dumps(row) + "\n" for row in rows))
        _, printed, _ = call(
            "critique", completions, "--recipe", recipe(tmp_path, server.url), "--show", 1
        )
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", printed), repr(printed)
    assert "owned" not in printed
    shown = "[bold]I like[/bold] <script>alert(1)</script>"
    assert " ".join(printed.split()).count(shown) >= 3, "markup is printed as text"


def test_a_file_may_set_correct_and_finished_and_failures_are_counted(
    tmp_path: Path, completions: Path, call: Call
) -> None:
    row = {"question": "cut", "text": "<step_1>Three bags of four are 12.</step_1><step_2>12",
           "answer": "10", "finished": False}  # fmt: skip
    labelled = {"question": "labelled", "text": RIGHT, "answer": "11", "correct": True}
    completions.write_text("\n".join(map(json.dumps, (row, labelled))))
    out = tmp_path / "out.jsonl"
    with serving(says(RIGHT)) as server:
        path = recipe(tmp_path, server.url)
        call("critique", completions, "--recipe", path, "--out", out)
        assert "cut off" in server.requests[0]["messages"][-1]["content"]
        cut, claimed = (json.loads(line) for line in out.read_text().splitlines())
        assert cut["critique"]["case"] == "C" and cut["critique"]["first_error"] is None
        assert claimed["correct"] and claimed["critique"]["reason"] == "wrong_answer"
        server.behaviours = [refuses(503)]
        words = ("--set", "critic.max_tokens=65")  # not in the reply cache
        status, printed, _ = call("critique", completions, "--recipe", path, *words)
    assert status == 0 and "no reply 2 100%" in line(printed, "unavailable:")
    assert "no critique to measure" in printed


def run_of_the_lab(folder: Path, **critic: Any) -> None:
    tiny: Mapping[str, Any] = {
        "model": {"path": "lab:two_styles"},
        "data": {"type": "lab", "train": 4, "validation": 1, "test": 1},
        "sampling": {"max_tokens": 20},  # every rollout is truncated
        "critic": {"type": "oracle", **critic},
        "context": {"type": "step_aligned"},
        "train": {"steps": 1, "problems_per_step": 2, "group_size": 2, "threads": 1},
        "evaluation": {"every": 1, "validation_k": 1, "test": False},
    }
    run_to_end(validate(Recipe, tiny), folder)


def test_rollouts_and_samples_of_a_run_get_its_critiques(tmp_path: Path, call: Call) -> None:
    run_of_the_lab(tmp_path / "run")
    critiqued = []
    for name in ("rollouts/step_000001.000.jsonl", "samples/step_000001.jsonl"):
        out = tmp_path / "out.jsonl"
        status, printed, _ = call("critique", tmp_path / "run" / name, "--out", out, "--show", 0)
        assert status == 0 and "the answer is" not in printed
        assert line(printed, "case C:") == "case C: cut off 4 100%"
        critiqued.append([json.loads(row) for row in out.read_text().splitlines()])
    saved = (tmp_path / "run" / "samples" / "step_000001.jsonl").read_text().splitlines()
    for row, sample in zip(critiqued[0], map(json.loads, saved), strict=True):
        assert (
            row["critique"] == sample["critique"] and row["first_change"] == sample["first_change"]
        )
    assert [row["critique"] for row in critiqued[0]] == [row["critique"] for row in critiqued[1]]
    # The policy itself can be the critic: here each prompt is longer than its context.
    policy = f'critic={{type="policy",max_tokens=8,reply_cache="{tmp_path / "store.sqlite"}"}}'
    samples = tmp_path / "run" / "samples" / "step_000001.jsonl"
    status, printed, _ = call("critique", samples, "--set", policy)
    assert status == 0 and "no reply 4 100%" in line(printed, "unavailable:")
    assert "exceed the context of 256" in " ".join(printed.split())
    recorded = f'critic={{type="recorded",run="{tmp_path / "run"}"}}'
    status, printed, _ = call("critique", samples, "--set", recorded, "--show", 0)
    assert line(printed, "case C:") == "case C: cut off 4 100%"


def test_wrong_input_is_one_line(tmp_path: Path, completions: Path, call: Call) -> None:
    path = recipe(tmp_path, "http://127.0.0.1:9/v1")

    def refused(*words: object) -> str:
        status, printed, error = call("critique", *words)
        assert (status, printed, error.count("\n")) == (2, "", 1), error
        return error

    assert "no server at" in refused(completions, "--recipe", path)
    offline = ("--recipe", path, "--set", "critic.healthcheck=false")
    assert "is not in a run folder" in refused(completions)
    assert "no such file of rollouts" in refused(tmp_path / "nothing.jsonl", *offline)
    oracle = ("--recipe", path, "--set", "critic={type='oracle'}")
    assert "no oracle critic" in refused(completions, *oracle)
    none = tmp_path / "none.toml"
    none.write_text('[context]\ntype = "reference"')
    assert "has no critic" in refused(completions, "--recipe", none)
    for text, message in {
        "\n": "is empty",
        '{"question": "a", "answer": "b"}': "completions.jsonl:1: no field 'text'",
        "[1]": "not a JSON object",
        '{"problem_id": "x", "token_ids": [1], "text": "a"}': "the recipe has no problem 'x'",
    }.items():
        completions.write_text(text)
        assert message in refused(completions, *offline)
