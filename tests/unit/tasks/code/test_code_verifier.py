"""Outcomes, feedback and evidence of code; where code is in an answer; how values are compared."""

from __future__ import annotations

import json
import math
from collections import Counter, OrderedDict, namedtuple
from decimal import Decimal
from enum import IntFlag
from fractions import Fraction
from typing import Any

import pytest

from selfteach.errors import DataError
from selfteach.tasks.code.answer_code import find_code, write_code
from selfteach.tasks.code.code_pool import CodePool
from selfteach.tasks.code.code_tests import KEY
from selfteach.tasks.code.code_verifier import CodeVerifier
from selfteach.tasks.code.sandbox.judge import equal, same_output
from selfteach.tasks.code.sandbox.values import decode, encode
from selfteach.types import Problem

TWO = {"shape": "asserts", "asserts": ["assert f(1, 2) == 3", "assert f(2, 3) == 5"], "setup": ""}


def problem(tests: dict[str, Any] = TWO) -> Problem:
    return Problem("p", "Add.", "def f(a, b): return a + b", meta={KEY: tests})


OUTCOMES = [
    ("def f(a, b):\n    return 3", "failed", None, ["Test: f(2, 3) == 5", "Expected: 5", "Got: 3",
                                                     "Tests passed before this one: 1 of 2"]),
    ("def f(a, b):\n    c = a - 1\n    return b // c", "exception", "return b // c",
     ["ZeroDivisionError", "Line 3 of the code: return b // c", "f(1, 2)"]),
    ("def g(x):\n    return x['k']\ndef f(a, b):\n    return g({})", "exception", "return x['k']",
     ["KeyError: 'k'"]),
    ("def f(a, b):\n    while a:\n        pass", "timeout", None, ["did not end within 1 seconds"]),
    ("def f(a, b):\n    return [a] * 10**11", "memory", "return [a] * 10**11", ["too much memory"]),
    ("def h(): pass\nimport numpy as np\ndef f(a, b): return np.add(a, b)", "import_refused",
     "import numpy as np", ["imports 'numpy'"]),
    ("def f(a, b):\n    import socket", "import_refused", "import socket", ["imports 'socket'"]),
    ("def f(a, b)\n    return a", "syntax", "def f(a, b)", ["not valid Python: SyntaxError"]),
    ("def f(a, b):\n    raise SystemExit(0)", "exit", "raise SystemExit(0)", ["sys.exit"]),
    ("def f(a, b):\n    import os; os._exit(3)", "exit", None, ["exit status 3"]),
    ("def g(a, b):\n    return a + b", "missing", None, ["does not define f"]),
    ("def f(a):\n    return a", "exception", None, ["TypeError"]),
]  # fmt: skip


@pytest.mark.parametrize(("code", "kind", "source", "texts"), OUTCOMES)
def test_outcomes_become_feedback_and_evidence(
    code: str, kind: str, source: str | None, texts: list[str], any_pool: CodePool
) -> None:
    answer = f"I think so.\n```python\n{code}\n```"
    verdict = CodeVerifier(pool=any_pool)(problem(), answer)
    assert not verdict.correct and verdict.evidence is not None
    assert verdict.evidence["kind"] == kind, verdict
    for text in texts:
        assert text in (verdict.feedback or ""), verdict.feedback
    if source is not None:
        begin, end = verdict.evidence["span"]  # type: ignore[misc]
        assert answer[begin:end] == source == verdict.evidence["source"]
    assert verdict.timed_out == (kind == "timeout")
    json.dumps(verdict.evidence)


def test_an_answer_without_code_is_not_formatted(any_pool: CodePool) -> None:
    verdict = CodeVerifier(pool=any_pool)(problem(), "I do not know.")
    assert not verdict.formatted and verdict.feedback == "There is no code in the answer."


def test_a_problem_without_tests_is_refused(any_pool: CodePool) -> None:
    with pytest.raises(DataError, match="problem 'x' has no tests"):
        CodeVerifier(pool=any_pool)(Problem("x", "q", "a"), "def f(): pass")


def test_many_answers_are_judged_in_order(any_pool: CodePool) -> None:
    codes = [f"def f(a, b): return a + b + {k % 2}" for k in range(12)] + ["no code here"]
    verdicts = CodeVerifier(pool=any_pool).verify_all([(problem(), code) for code in codes])
    assert [v.correct for v in verdicts] == [k % 2 == 0 for k in range(12)] + [False]


def test_functions_that_change_their_arguments_and_objects_can_be_tested(
    any_pool: CodePool,
) -> None:
    code = "def f(x):\n    x.sort()\nclass Stack:\n    def __init__(self): self.items = []\n"
    code += "    def push(self, x): self.items.append(x)\n"
    code += "    def __len__(self): return len(self.items)\n"
    code += "def g(n):\n    for i in range(n): yield i\n"
    tests = ["x = [2, 1]\nf(x)\nassert x == [1, 2]", "s = Stack()\ns.push(4)\nassert s.items == [4]",
             "s = Stack()\ns.push(4)\nassert len(s) == 1", "assert list(g(3)) == [0, 1, 2]",
             "try:\n    f(3)\n    assert False\nexcept AttributeError:\n    pass",
             "assert math.isclose(sum(g(3)), 3)"]  # fmt: skip
    outcome = any_pool.run({"shape": "asserts", "asserts": tests, "setup": ""}, code)
    assert outcome["kind"] == "passed", outcome


@pytest.mark.parametrize(
    ("tests", "detail"),
    [
        (["assert 1 == 1"], "call nothing"),
        (["import numpy\nassert f(1, 2) == 3"], "numpy"),
        (["assert f(lambda x: x, 2) == 3"], "no plain value"),
    ],
)
def test_tests_that_cannot_be_run_are_no_fault_of_the_answer(
    tests: list[str], detail: str, any_pool: CodePool
) -> None:
    shape = {"shape": "asserts", "asserts": tests, "setup": "", "entry_point": "f"}
    outcome = any_pool.run(shape, "def f(a, b): return a + b")
    assert outcome["kind"] == "tests" and detail in outcome["detail"], outcome


def test_an_answer_is_compiled_as_a_file_of_its_own(any_pool: CodePool) -> None:
    """No future statement of the runner's holds for the answer or for tests."""
    code = "def f(x: int): return f.__annotations__['x'] is int"
    tests = {"shape": "asserts", "asserts": ["assert f(1)"], "setup": ""}
    assert any_pool.run(tests, code)["kind"] == "passed"
    program = {"shape": "programs", "cases": [{"stdin": "", "stdout": "True"}]}
    assert any_pool.run(program, code + "\nprint(f(1))")["kind"] == "passed"


@pytest.mark.parametrize("text", ["\ud800", "\0", "\x1b[2J", "é" * 5000])
def test_what_an_answer_says_can_be_stored(text: str, any_pool: CodePool) -> None:
    for code in (f"def f(a, b): raise ValueError({text!r})", f"def f(a, b): return {text!r}"):
        verdict = CodeVerifier(pool=any_pool)(problem(), f"```python\n{code}\n```")
        json.dumps(verdict.evidence, ensure_ascii=False).encode()
        assert len((verdict.feedback or "").encode()) < 10_000


def test_verdicts_do_not_depend_on_hash_seeds_or_random_numbers(any_pool: CodePool) -> None:
    code = "import random\ndef f(): return [random.random(), list({'a', 'b', 'c', 'd', 'e'})]"
    tests = {"shape": "cases", "cases": [{"call": "f", "args": [], "expected": 0}]}
    got = {any_pool.run(tests, code + "\n" * k)["got"] for k in range(6)}
    assert len(got) == 1


# -- code in an answer ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("```python\na = 1\n```", "a = 1\n"),
        ("So:\n```py\na = 1\n```\nor\n```\nb = 2\n```", "b = 2\n"),
        ("```python\ndef f(): pass\n```\nUse:\n```python\nprint(f())\n```", "def f(): pass\n"),
        ("```bash\nls\n```\n```python\na = 1\n```\n```text\nout\n```", "a = 1\n"),
        ("<answer>a = 1</answer>", "a = 1"),
        ("```python\nold = 1\n```\n<answer>\n```python\na = 1\n```\n</answer>", "a = 1\n"),
        ("```python\na = 1\n```\n<answer>42</answer>", "a = 1\n"),
        ("````python\ns = '```'\n````", "s = '```'\n"),
        ("~~~python\na = 1\n~~~", "a = 1\n"),
        ("```python\na = 1", "a = 1"),
        ("def f():\n    return 1", "def f():\n    return 1"),
        ("I do not know.", None),
        ("", None),
    ],
)
def test_code_is_found(text: str, code: str | None) -> None:
    for line_break in ("\n", "\r\n"):
        written = text.replace("\n", line_break)
        code_in_text = find_code(written, ["f"])
        expected = code and code.replace("\n", line_break)
        assert (code_in_text.code if code_in_text else None) == expected
        if code_in_text:
            assert written[code_in_text.begin :].startswith(code_in_text.code)


def test_line_breaks_of_windows_change_no_verdict(any_pool: CodePool) -> None:
    """In answers, statements, test code, set-up, input and output."""
    code = "def f(a, b):\n    total = (a +\n        b)\n    return total\n"
    check = (
        "def check(candidate):\n    for k in range(3):\n        assert candidate(k, 1) == k + 1\n"
    )
    programs = {"shape": "programs", "cases": [{"stdin": "1 2\n3\n", "stdout": "3\n3\n"}]}
    for tests, answer in (
        (TWO | {"setup": "x = 1\ny = 2\n", "prelude": "import math\nimport re\n"}, code),
        ({"shape": "check", "check": check, "entry_point": "f", "prelude": "z = 1\n\n"}, code),
        (programs, code + "print(f(*map(int, input().split())))\nprint(input())\n"),
    ):
        tests = json.loads(json.dumps(tests).replace("\\n", "\\r\\n"))
        text = f"So:\n```python\n{answer}```\nDone.\n".replace("\n", "\r\n")
        verdict = CodeVerifier(pool=any_pool)(problem(tests), text)
        assert verdict.correct, verdict
        wrong = CodeVerifier(pool=any_pool)(problem(tests), text.replace("  b)", "  c)"))
        assert wrong.evidence is not None and wrong.evidence["source"] == "c)", wrong
        begin, end = wrong.evidence["span"]  # type: ignore[misc]
        assert text[begin:end] == "b)"


def test_written_code_is_found_again_and_hostile_text_takes_no_time() -> None:
    code = 'x = """\n```\n"""'
    found_code = find_code(write_code(code))
    assert found_code is not None and found_code.code.strip() == code
    for hostile in (
        "```" * 50_000,
        "```\n" * 50_000,
        "<answer>x</answer>" * 5000,
        "~~~py\n" * 20_000,
    ):
        find_code(hostile, ["f"])


# -- values ---------------------------------------------------------------------------------------

Point = namedtuple("Point", "x y")


@pytest.mark.parametrize(
    "value",
    [None, True, 3, -1.5, "é\ud800\n", [1, [2]], (1, (2,)), {1: "a", (2, 3): [4]}, {1, 2}, b"\x00a",
     frozenset([1]), pytest.param(10**5000, id="big"), 1j, range(3),
     Fraction(1, 3), Decimal("1.10"), bytearray(b"x"), 0.1, math.inf, {}, {"#": "int", "v": "0x1"}],
)  # fmt: skip
def test_values_come_back_with_their_types(value: Any) -> None:
    sent = json.loads(json.dumps(encode(value, lambda _: 0)))
    back = decode(sent, lambda *_: None)
    assert back == value and type(back) is type(value)


def test_values_of_subclasses_become_plain() -> None:
    for value, plain in (
        (Counter("aa"), {"a": 2}), (OrderedDict(b=1), {"b": 1}), (Point(1, 2), (1, 2)),
        (IntFlag("F", "a b").b, 2),
    ):  # fmt: skip
        back = decode(json.loads(json.dumps(encode(value, lambda _: 0))), lambda *_: None)
        assert back == plain and type(back) is type(plain)


@pytest.mark.parametrize(
    ("expected", "got", "tolerance", "result"),
    [
        ([1, 2.0], [1.0, 2], None, True),
        (1, True, None, False),
        (0, False, None, False),
        ([True], [1], None, False),
        ({"a": [1]}, {"a": [1]}, None, True),
        (0.3, 0.1 + 0.2, None, False),
        ([0.3], [0.1 + 0.2], 1e-9, True),
        (1.0, math.nan, 1e-9, False),
        (1.5, 10**400, 1e-9, False),
        ("a", "a ", None, False),
    ],
)
def test_values_of_cases_are_compared(
    expected: Any, got: Any, tolerance: float | None, result: bool
) -> None:
    assert equal(expected, got, tolerance) is result


@pytest.mark.parametrize(
    ("expected", "got", "result"),
    [
        ("3\n", "3", True),
        ("1 2\n3\n", "1 2 \n 3\n\n", True),
        ("0.50", "0.5", True),
        ("3", "4", False),
        ("1\n2", "1 2", False),
        ("YES", "yes", False),
        ("1", "1\n1", False),
        ("1", "sNaN", False),
    ],
)
def test_outputs_are_compared(expected: str, got: str, result: bool) -> None:
    assert same_output(expected, got) is result
