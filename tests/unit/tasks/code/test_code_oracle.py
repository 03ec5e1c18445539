"""The oracle of code: the first wrong line of hand-made programs, and why there may be none."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from selfteach.config.code_section import CodeConfig
from selfteach.errors import DataError
from selfteach.tasks.code.code_mutations import mutants
from selfteach.tasks.code.code_oracle import SOLUTIONS, CodeOracle
from selfteach.tasks.code.code_tests import KEY
from selfteach.tasks.code.code_verifier import CodeVerifier
from selfteach.tasks.code.program_alignment import align
from selfteach.types import Critique, CritiqueFailure, Problem

LOOP = """\
def count_above(numbers, limit):
    count = 0
    for number in numbers:
        if number > limit:
            count += 1
    return count"""
SHORT = """\
def count_above(numbers, limit):
    return sum(1 for number in numbers if number > limit)"""
INDEX = """\
def count_above(numbers, limit):
    total = 0
    i = 0
    while i < len(numbers):
        if numbers[i] > limit:
            total = total + 1
        i += 1
    return total"""
CASES = [
    {"call": "count_above", "args": [[], 3], "expected": 0},
    {"call": "count_above", "args": [[1, 5, 3, 9], 3], "expected": 2},
    {"call": "count_above", "args": [[4, 4], 3], "expected": 2},
]


def problem(tests: dict[str, Any] | None = None, **meta: Any) -> Problem:
    tests = tests or {"shape": "cases", "cases": CASES}
    return Problem("p", "Count.", LOOP, {}, {KEY: tests, SOLUTIONS: [LOOP, SHORT, INDEX], **meta})


@pytest.fixture(scope="module")
def oracle() -> Iterator[CodeOracle]:
    try:
        verify = CodeVerifier(CodeConfig(cpu_s=0.5, workers=1))
    except DataError as error:
        pytest.skip(str(error))
    yield CodeOracle(verify)
    verify.process.close()


def block(code: str) -> str:
    return f"Here:\n```python\n{code}\n```"


def fixed(critique: Critique | CritiqueFailure) -> list[tuple[str | None, str]]:
    assert isinstance(critique, Critique), critique
    return [(step.original, step.text) for step in critique.steps if step.status == "fixed"]


def replaced(code: str, old: str, new: str) -> str:
    assert old in code
    return code.replace(old, new)


@pytest.mark.parametrize(
    ("code", "line", "text"),
    [
        (replaced(LOOP, "count = 0", "count = 1"), 1, "    count = 0"),
        (replaced(LOOP, "> limit", ">= limit"), 3, "        if number > limit:"),
        (replaced(LOOP, "+= 1", "+= number"), 4, "            count += 1"),
        (replaced(LOOP, "    return", "        return"), 5, "    return count"),
        (replaced(INDEX, "i += 1", "i += 2"), 6, "        i += 1"),
        (replaced(SHORT, "> limit", "< limit"), 1,
         "    return sum(1 for number in numbers if number > limit)"),
        # The solution is written in the answer's names.
        (replaced(LOOP, "> limit", "!= limit").replace("count ", "n ").replace("number ", "x ")
         .replace("count", "n").replace("n_above", "count_above"), 3, "        if x > limit:"),
        # What is written otherwise and does the same is right.
        (replaced(replaced(LOOP, "count += 1", "count = 1 + count"), "return c", "return -c"),
         5, "    return count"),
        (replaced(LOOP, "    count += 1", "    print(number)\n            count -= 1"), 5,
         "            count += 1"),
        # A loop without end, an exception, and a syntax error.
        (replaced(INDEX, "        i += 1", "        i += 0"), 6, "        i += 1"),
        (replaced(LOOP, "number > limit", "number > limits"), 3, "        if number > limit:"),
        (replaced(LOOP, "numbers:", "numbers"), 2, "    for number in numbers:"),
    ],
)  # fmt: skip
def test_the_first_wrong_line_is_corrected(
    oracle: CodeOracle, code: str, line: int, text: str
) -> None:
    critique = oracle(problem(), block(code), finished=True)
    assert isinstance(critique, Critique), critique
    assert critique.first_error == line + 2 and critique.case == "D"
    assert [new for _, new in fixed(critique)] == [text]
    steps = [step.text for step in critique.steps]
    assert steps[:2] == ["Here:", "```python"] and steps[-1] == "```"
    assert steps[2 : line + 2] == code.split("\n")[:line]
    assert critique.answer == LOOP


def test_a_missing_line_is_inserted(oracle: CodeOracle) -> None:
    critique = oracle(problem(), block(replaced(LOOP, "    count = 0\n", "")), finished=True)
    assert isinstance(critique, Critique) and critique.first_error == 3
    assert [(s.status, s.text) for s in critique.steps][2:5] == [
        ("kept", "def count_above(numbers, limit):"), ("new", "    count = 0"),
        ("kept", "    for number in numbers:"),
    ]  # fmt: skip
    unreturned = oracle(problem(), block(replaced(LOOP, "\n    return count", "")), finished=True)
    assert isinstance(unreturned, Critique) and unreturned.first_error == 7
    assert unreturned.steps[-2].text == "    return count"


def test_a_right_answer_is_all_right_and_a_truncated_one_is_completed(oracle: CodeOracle) -> None:
    right = oracle(problem(), block(INDEX) + "\nDone.", finished=True)
    assert isinstance(right, Critique) and (right.case, right.first_error) == ("A", None)
    assert {step.status for step in right.steps} == {"kept"} and right.steps[-1].text == "Done."
    cut = oracle(problem(), "```python\n" + LOOP[: LOOP.index("+= 1")], finished=False)
    assert isinstance(cut, Critique) and (cut.case, cut.first_error) == ("C", None)
    assert "\n".join(step.text for step in cut.steps[1:-1]) == LOOP
    wrong = replaced(LOOP[: LOOP.index("+= 1")], "> limit", "< limit")
    early = oracle(problem(), "```python\n" + wrong, finished=False)
    assert isinstance(early, CritiqueFailure) or early.first_error == 4


OTHER = """\
def count_above(numbers, limit):
    big = sorted(numbers, reverse=True)
    big.append(limit)
    place = big.index(limit)
    left = big[:place]
    assert left
    return len(left) - 1"""


@pytest.mark.parametrize(
    ("text", "meta", "reason"),
    [
        ("I do not know.", {}, "no_code"),
        (block(OTHER), {}, "other_way"),
        (block(replaced(LOOP, "= 0", "= 1")), {SOLUTIONS: ["def count_above(a, b): return 2"]}, ""),
        (block(replaced(LOOP, "count_above", "count")), {}, "no_trace"),
        (block("def count_above(numbers, limit):\n    count = 0\n" + "    count += 0\n" * 90), {},
         "other_way"),
    ],
)  # fmt: skip
def test_where_no_line_is_first_wrong_there_is_a_reason(
    oracle: CodeOracle, text: str, meta: dict[str, Any], reason: str
) -> None:
    critique = oracle(problem(**meta), text, finished=True)
    if not reason:  # the problem's answer is a worked solution too
        assert isinstance(critique, Critique) and critique.first_error == 3
        return
    assert isinstance(critique, CritiqueFailure) and critique.reason == reason, critique


def test_problems_without_solutions_have_no_oracle(oracle: CodeOracle) -> None:
    bare = Problem("p", "Count.", "", {}, {KEY: {"shape": "cases", "cases": CASES}})
    critique = oracle(bare, block(replaced(LOOP, "= 0", "= 1")), finished=True)
    assert isinstance(critique, CritiqueFailure) and critique.reason == "no_solution"


RECURSIVE = """\
def f(n):
    if n <= 2:
        return 0
    if n % 2 == 0:
        return 1 + f(n // 2)
    return 1 + f(n - 1)"""


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [("n <= 2", "n < 2", 1), ("return 0", "return 1", 2), ("1 + f(n // 2)", "2 + f(n // 2)", 4)],
)
def test_an_error_in_an_inner_call_is_the_first(
    oracle: CodeOracle, old: str, new: str, line: int
) -> None:
    cases = [
        {"call": "f", "args": [n], "expected": e} for n, e in ((1, 0), (2, 0), (5, 2), (13, 4))
    ]
    one = Problem("p", "q", RECURSIVE, {}, {KEY: {"shape": "cases", "cases": cases}})
    critique = oracle(one, replaced(RECURSIVE, old, new), finished=True)
    assert isinstance(critique, Critique) and critique.first_error == line, critique


def test_comments_and_examples_of_use_make_no_other_way(oracle: CodeOracle) -> None:
    doc = (
        '    """Count them.\n\n    More.\n    """\n    # One\n    # Two\n    # Three\n    # Four\n'
    )
    doc += "    # And more.\n    # And more.\n"
    code = replaced(replaced(LOOP, "> limit", ">= limit"), "    count = 0", doc + "    count = 0")
    usage = (
        "\n# Example usage:\nnumbers = [1, 2]\nlimit = 1\nprint(count_above(numbers, limit))\nx = 1"
    )
    critique = oracle(problem(), block(code + usage), finished=True)
    assert isinstance(critique, Critique), critique
    assert [new for _, new in fixed(critique)] == ["        if number > limit:"]


def test_two_errors_on_different_inputs_are_ambiguous(oracle: CodeOracle) -> None:
    solution = "def f(x):\n    if x > 9:\n        x = 3\n    y = x + 1\n    return y"
    cases = [{"call": "f", "args": [n], "expected": e} for n, e in ((1, 2), (20, 4))]
    one = Problem("p", "q", solution, {}, {KEY: {"shape": "cases", "cases": cases}})
    both = replaced(replaced(solution, "x = 3", "x = 4"), "x + 1", "x + 2")
    critique = oracle(one, block(both), finished=True)
    assert isinstance(critique, CritiqueFailure) and critique.reason == "ambiguous"
    assert "line 4 departs first, line 3 cannot be completed" in critique.detail


@pytest.mark.parametrize(
    "tests",
    [
        {"shape": "asserts", "setup": "", "entry_point": None,
         "asserts": ["assert count_above([], 1) == 0", "assert count_above([3, 2], 2) == 1"]},
        {"shape": "check", "entry_point": "count_above",
         "check": "def check(f):\n    assert f([], 1) == 0\n    assert f([3, 2], 2) == 1\n"},
    ],
    ids=["asserts", "check"],
)  # fmt: skip
def test_statements_as_tests_have_an_oracle_too(oracle: CodeOracle, tests: dict[str, Any]) -> None:
    code = replaced(LOOP, "> limit", ">= limit")
    critique = oracle(problem(tests), block(code), finished=True)
    assert isinstance(critique, Critique) and critique.first_error == 5


def test_a_critic_that_errs_writes_a_wrong_program_and_the_first_error_stays(
    oracle: CodeOracle,
) -> None:
    code = block(replaced(LOOP, "> limit", ">= limit"))
    rng = np.random.default_rng(0)
    critique = oracle(problem(), code, finished=True, error_rate=1.0, rng=rng)
    assert isinstance(critique, Critique) and critique.first_error == 5
    steps = "\n".join(step.text for step in critique.steps)
    assert critique.answer in steps and critique.answer != LOOP
    again = oracle(problem(), code, finished=True, error_rate=1.0, rng=np.random.default_rng(0))
    assert again == critique


FORGERY = """\
import gc
def forge(events):
    for tracer in [o for o in gc.get_objects() if type(o).__name__ == "LineTracer"]:
        tracer._limit = 10**9
        tracer.events = events
def count_above(numbers, limit):
    forge({events})
    return -1"""


@pytest.mark.parametrize(
    "events",
    ["None", "{1: 2}", "[[1, {(): object()}], 3, [2, 5], ['x', {}]]", "[[2, {'0next': [1]}]] * 9",
     "[[2, {'x': 'y' * 10**5}]] * 10", "[[3, {'x' * 99: 10**5000}]]", "[[2, {'x': 'z'}]] * 20000"],
)  # fmt: skip
def test_a_forged_trace_is_data_and_decides_nothing(oracle: CodeOracle, events: str) -> None:
    solution = FORGERY.replace("forge({events})", "pass").replace("-1", "0")
    tests = {"shape": "cases", "cases": [{"call": "count_above", "args": [[], 1], "expected": 0}]}
    one = Problem("p", "q", solution, {}, {KEY: tests})
    critique = oracle(one, block(FORGERY.replace("{events}", events)), finished=True)
    if isinstance(critique, Critique):  # the program was run, whatever the trace says
        assert critique.answer == solution
    else:
        assert critique.reason in ("ambiguous", "no_trace")


def test_a_solution_is_aligned_and_renamed() -> None:
    answer = LOOP.replace("number ", "x ").replace("count =", "n =").replace("count +", "n +")
    alignment = align(answer.replace("return count", "return n").split("\n"), INDEX.split("\n"))
    assert alignment.solution[1] == "    n = 0" and alignment.solution[-1] == "    return n"
    swapped = align(["def f(b, a):", "    return b"], ["def f(a, b):", "    return a - b"])
    assert swapped.solution == ("def f(b, a):", "    return b - a") and swapped.starts == (0, 1, 2)
    collision = align(["def f(t):", "    return t"], ["def f(x):", "    t = x", "    return t + x"])
    assert collision.solution == ("def f(t):", "    t_2 = t", "    return t_2 + t")
    keyword = align(["def f(key):"], ["def f(x):", "    return sorted(x, key=x.key)"])
    assert keyword.solution[1] == "    return sorted(key, key=key.key)"


def test_mutants_change_one_token() -> None:
    assert mutants("    if x <= 10 and y:") == [
        "    if x < 10 and y:", "    if x <= 11 and y:", "    if x <= 10 or y:",
    ]  # fmt: skip
    assert mutants("    return name") == []
