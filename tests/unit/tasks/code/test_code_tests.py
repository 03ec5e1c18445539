"""Unit tests are read from rows of the shapes of well-known data sets, and run."""

from __future__ import annotations

import base64
import json
import pickle
import zlib
from typing import Any

import pytest

from selfteach.config.code_section import CodeConfig
from selfteach.config.data_section import Columns, HubData
from selfteach.tasks.code.code_pool import CodePool
from selfteach.tasks.code.code_tests import KEY, read_tests, with_tests
from selfteach.tasks.code.code_verifier import CodeVerifier, wrong_code
from selfteach.tasks.sources.columns import problem_from, with_mapping
from selfteach.tasks.sources.source_row import MissingValue, Row
from selfteach.types import Problem

MBPP = {
    "task_id": 601, "text": "Longest chain.", "test_setup_code": "",
    "code": "class Pair(object):\n    def __init__(self, a, b):\n        self.a, self.b = a, b\n"
            "def longest(arr, n):\n    return len([p for p in arr if p.a < p.b][:n])",
    "test_list": ["assert longest([Pair(5, 24), Pair(15, 25), Pair(27, 20)], 3) == 2",
                  "assert longest([Pair(1, 2)], 1) == 1"],
}  # fmt: skip
HUMANEVAL = {
    "task_id": "HumanEval/38", "entry_point": "decode_cyclic",
    "prompt": "def encode_cyclic(s: str):\n    return s[1:] + s[:1]\n\n\n"
              "def decode_cyclic(s: str):\n    \"\"\" Decodes. \"\"\"\n",
    "canonical_solution": "    return s[-1:] + s[:-1]\n",
    "test": "METADATA = {}\n\ndef check(candidate):\n    from random import randint\n"
            "    for _ in range(20):\n        text = ''.join(chr(randint(97, 122)) for _ in range(9))\n"
            "        assert candidate(encode_cyclic(text)) == text\n",
}  # fmt: skip


def packed(cases: list[dict[str, str]]) -> str:
    """Return private test cases as LiveCodeBench stores them."""
    text = pickle.dumps(json.dumps(cases))
    return base64.b64encode(zlib.compress(text)).decode()


STDIN = {
    "question_id": "abc", "question_content": "Add.", "starter_code": "", "platform": "atcoder",
    "difficulty": "easy", "contest_date": "2024-01-01", "metadata": "{}",
    "public_test_cases": json.dumps([{"input": "1 2\n", "output": "3\n", "testtype": "stdin"}]),
    "private_test_cases": packed([{"input": "5 6\n", "output": "11", "testtype": "stdin"}] * 3),
}  # fmt: skip
FUNCTIONAL = STDIN | {
    "starter_code": "class Solution:\n    def add(self, a: int, b: List[int]) -> int:\n        ",
    "metadata": json.dumps({"func_name": "add"}),
    "public_test_cases": json.dumps(
        [{"input": "1\n[2, 3]", "output": "6", "testtype": "functional"}]
    ),
    "private_test_cases": packed([{"input": "0\n[]", "output": "0", "testtype": "functional"}]),
}
OURS = {
    "question": "Halve.", "answer": "def half(x):\n    return x / 2",
    "tests": [{"call": "half", "args": [4], "expected": 2},
              {"call": "half", "kwargs": {"x": 0.2}, "expected": 0.1000001, "tolerance": 1e-3}],
}  # fmt: skip


def problem_of(values: dict[str, Any], mapping: str | None = None, **code: Any) -> Problem:
    row = Row(values, "rows.jsonl:1", "rows-1")
    if mapping is None:
        return with_tests(problem_from(row, Columns()), row, CodeConfig(**code))
    config = with_mapping(HubData(type="hub", mapping=mapping))
    assert config.columns is not None and config.verifier == "code"
    return with_tests(problem_from(row, config.columns), row, config.code)


CASES = {
    "mbpp": (problem_of(MBPP, "mbpp"), MBPP["code"], "[:n]", "[:0]"),
    "humaneval": (
        problem_of(HUMANEVAL, "humaneval"),
        HUMANEVAL["prompt"] + HUMANEVAL["canonical_solution"], "s[-1:]", "s[-2:]",
    ),
    "stdin": (
        problem_of(STDIN, "livecodebench"), "print(sum(map(int, input().split())))", "sum", "max",
    ),
    "functional": (
        problem_of(FUNCTIONAL, "livecodebench"),
        "class Solution:\n    def add(self, a: int, b: List[int]) -> int:\n"
        "        return a + reduce(add, b, 0)", "a + ", "",
    ),
    "ours": (problem_of(OURS), OURS["answer"], "/ 2", "/ 3"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_right_code_passes_and_wrong_code_fails(name: str, any_pool: CodePool) -> None:
    problem, code, before, after = CASES[name]
    verify = CodeVerifier(pool=any_pool)
    right = verify(problem, f"Here it is.\n```python\n{code}\n```\nDone.")
    assert right.correct and right.feedback is None, right
    wrong = verify(problem, f"```python\n{code.replace(before, after)}\n```")
    assert not wrong.correct and wrong.evidence is not None
    assert wrong.evidence["kind"] == "failed", wrong
    assert "Expected: " in (wrong.feedback or "")
    for nothing in wrong_code(problem):
        assert not verify(problem, nothing).correct


def test_livecodebench_s_modules_are_modules_and_its_recursion_is_deep(any_pool: CodePool) -> None:
    """As upstream: stars first, then modules, then a limit of 50,000 calls, also through C."""
    code = """
class Solution:
    def add(self, a: int, b: List[int]) -> int:
        assert bisect.bisect_left([1, 2, 3], 2) == 1 and 1 <= random.randint(1, 2) <= 2
        assert copy.copy(b) == b and datetime.datetime(2020, 1, 1).year == 2020
        assert deepcopy(b) == b and choice([1]) == 1 and sqrt(4) == heappop([2]) == 2
        assert operator.add(1, 2) == add(1, 2) == 3 and string.digits == digits
        @cache
        def depth(n): return n and 1 + depth(n - 1)
        def walk(n): return n and 1 + walk(n - 1)
        def sort(n): return n and 1 + sorted([n - 1], key=sort)[0]
        deep_in_c = 20_000 if sys.version_info < (3, 12) else 2_000  # later ones limit that themselves
        assert walk(DEEP) == DEEP and depth(deep_in_c) == sort(deep_in_c) == deep_in_c
        return a + sum(b)
"""
    problem, *_ = CASES["functional"]
    verify = CodeVerifier(pool=any_pool)
    for deep in (5_000, 45_000):
        verdict = verify(problem, code.replace("DEEP", str(deep)))
        assert verdict.correct, verdict
    endless = verify(problem, code.replace("return n and", "return").replace("DEEP", "1"))
    assert endless.evidence is not None and endless.evidence["kind"] == "exception", endless


def test_wrong_code_shows_tests_that_cannot_tell(any_pool: CodePool) -> None:
    """Natively too: what the test expects is computed from what the function has emptied."""
    weak = "x = [3, 1, 2]\nout = f(x)\nassert out == sorted(x)"
    better = "x = [3, 1, 2]\nout = f([*x])\nassert out == sorted(x)"
    verify = CodeVerifier(pool=any_pool)
    for test, accepted in ((weak, 1), (better, 0)):
        tests = {"shape": "asserts", "asserts": [test], "setup": "", "entry_point": None}
        problem = Problem("p", "Sort.", "def f(x):\n    return sorted(x)", meta={KEY: tests})
        assert verify(problem, problem.answer or "").correct
        assert sum(verify(problem, wrong).correct for wrong in wrong_code(problem)) == accepted


def test_problems_survive_their_file() -> None:
    """A stored problem (``select`` writes its ``meta``) has its tests without the columns."""
    problem, *_ = CASES["stdin"]
    stored = {"question": "Add.", "meta": json.loads(json.dumps(problem.meta))}
    assert read_tests(stored, CodeConfig()) == problem.meta[KEY]
    assert len(problem.meta[KEY]["cases"]) == 4  # type: ignore[index]


class Touch:
    """Runs a program when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("raise SystemExit('unpickled')",)


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({}, "no column of tests"),
        ({"tests": []}, "no column of tests"),
        ({"tests": [1]}, "a test is"),
        ({"tests": "assert f("}, "no column names the entry point"),
        ({"tests": "assert f(", "entry_point": "f"}, "no Python"),
        ({"test_list": ["assert f(1) =="]}, "'test_list' is no Python"),
        ({"tests": [{"call": "f g", "expected": 1}]}, "names no function"),
        ({"tests": [{"call": "f", "expected": 1, "arg": []}]}, "unknown key 'arg'"),
        ({"tests": [{"call": "f", "args": "x", "expected": 1}]}, "args is no list"),
        ({"tests": [{"call": "f", "expected": 1}, {"stdin": "", "stdout": ""}]}, "mixes"),
        ({"private_test_cases": "eJ" + "A" * 60}, "packed tests cannot be read"),
        (
            {"private_test_cases": base64.b64encode(zlib.compress(pickle.dumps(Touch()))).decode()
             + ""}, "the pickle names builtins.exec",
        ),
        *(
            ({"private_test_cases": base64.b64encode(zlib.compress(data)).decode()},
             "packed tests cannot be read")
            for data in (
                pickle.dumps([{"input": bytes(range(99)), "output": b"2"}]),
                b"K\x01K\x02a." + bytes(range(99)),
                b"}]K\x01s." + bytes(range(99)), pickle.dumps([{1, 2}, *range(99)]),
                b"\x80\x05\x95" + bytes(range(99)), b"cos\n" + bytes(range(200)),
                b"(" * 10**6 + b"l" * 10**6 + b".", b"[" * 99 + bytes(range(60)),
            )
        ),
        ({"input_output": '{"inputs": [[1]], "outputs": [1], "fn_name": "f"}'}, "APPS"),
        (
            {"tests": [{"testtype": "functional", "input": "1", "output": "1"}]},
            "no func_name in metadata",
        ),
    ],
)  # fmt: skip
def test_rows_without_readable_tests_say_so(values: dict[str, Any], error: str) -> None:
    with pytest.raises(MissingValue, match=error) as raised:
        read_tests(values, CodeConfig())
    assert "\n" not in str(raised.value)


def test_names_in_the_recipe_are_columns_or_the_name_itself() -> None:
    values = {"unit": ["assert g(1) == 1"], "function": "g", "before": "import math"}
    tests = read_tests(values, CodeConfig(tests="unit", entry_point="function", setup="before"))
    assert (tests["entry_point"], tests["setup"]) == ("g", "import math")
    assert read_tests(values, CodeConfig(tests="unit", entry_point="h"))["entry_point"] == "h"


def test_programs_of_apps_are_read() -> None:
    values = {"input_output": json.dumps({"inputs": ["1\n", ["2", "3"]], "outputs": ["1", ["2"]]})}
    cases = read_tests(values, CodeConfig())["cases"]
    assert cases == [{"stdin": "1\n", "stdout": "1"}, {"stdin": "2\n3", "stdout": "2"}]
