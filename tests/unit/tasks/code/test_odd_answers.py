# ruff: noqa: E501
"""Odd answers: right ones pass, whatever types and streams they use; wrong ones fail for what they did."""

from __future__ import annotations

import time
from typing import Any

import pytest

from selfteach.config.code_section import CodeConfig
from selfteach.tasks.code.answer_code import find_code
from selfteach.tasks.code.code_pool import CodePool
from selfteach.tasks.code.code_tests import read_tests
from selfteach.tasks.code.sandbox.judge import equal, same_output
from selfteach.tasks.sources.source_row import UnreadableValue

RIGHT: dict[str, tuple[str, str]] = {
    "deque": (
        "from collections import deque\ndef f(x): x.append(3); return deque(x, 2)",
        "d = collections.deque([1])\nassert f(d) == collections.deque([1, 3], 2)\nassert len(d) == 2",
    ),
    "date": (
        "import datetime\ndef f(x): return x + datetime.timedelta(1)",
        "assert f(datetime.date(2020, 1, 31)) == datetime.date(2020, 2, 1)",
    ),
    "difference of times": ("def f(x, y): return y - x", "d = datetime.datetime\n"
        "assert f(d(2020, 1, 1), d(2020, 1, 2, 3)) == datetime.timedelta(1, 10800)"),
    "keys": ("def f(x): return x.keys()", "assert f({2: 1, 1: 2}) == {1, 2}\nassert [*f({2: 1})] == [2]"),
    "big fraction": ("from fractions import Fraction\ndef f(x): return Fraction(1, 3**x)",
        "assert f(20000) * 3**20000 == 1"),
    "changed by name": ("def f(x): x.sort()", "a = [2, 1]\nf(x=a)\nassert a == [1, 2]"),
    "named like a module": ("class Node:\n    def __init__(self, v): self.v = v\n"
        "def profile(node): return node.v", "assert profile(Node(3)) == 3"),
    "KeyError": ("def f(x): raise KeyError('k')",
        "try: f(1)\nexcept KeyError as e: got = str(e), e.args\nassert got == (\"'k'\", ('k',))"),
    "UnicodeDecodeError": ("def f(x): return x.decode()",
        "try: f(b'\\xff')\nexcept UnicodeDecodeError: f(b'a')\nelse: assert False"),
    "ExceptionGroup": ("def f(x): raise ExceptionGroup('a', [ValueError(x)])",
        "ok = False\ntry: f(1)\nexcept ExceptionGroup: ok = True\nassert ok"),
    "byte order mark": ("\ufeffdef f(x): return x", "assert f(1) == 1"),
    "partial": ("from functools import partial\nf = partial(pow, 2)", "assert f(3) == 8"),
    "threads": ("from concurrent.futures import ThreadPoolExecutor as T\n"
        "def f(x):\n    with T(4) as pool: return list(pool.map(abs, x))", "assert f([-1]) == [1]"),
}  # fmt: skip
"""Code, and a test that it passes."""

PROGRAMS: dict[str, str] = {
    "exit": "print(7)\nexit(0)",
    "quit": "print(7)\nquit()",
    "stream wrapped": "import io, sys\nsys.stdout = io.TextIOWrapper(sys.stdout.buffer)\nprint(7)",
    "stream replaced": "import io, sys\nout = sys.stdout\nsys.stdout = io.StringIO()\nprint(7)\n"
    "out.write(sys.stdout.getvalue())",
    "stream removed": "import sys\nwrite = sys.stdout.write\nsys.stdout = None\nwrite('7')",
    "stream closed": "import sys\nprint(7)\nsys.stdout.close()",
    "file left open": "file = open(1, 'w')\nprint(7, file=file)",
    "printed at the end": "class A:\n    def __del__(self): print(7)\na = A()",
    "exit function": "import atexit\natexit.register(print, 7)",
    "stream of one's own": "import os, sys\nclass Out:\n    closed, text = False, ''\n"
    "    def write(self, text): self.text += text\n"
    "    def flush(self):\n        os.write(1, self.text.encode())\n        self.text = ''\n"
    "sys.stdout = Out()\nprint(7)",
    "input wrapped": "import io, sys\nsys.stdin = io.TextIOWrapper(sys.stdin.buffer)\nprint(4 + int(input()))",
}
"""Programs that print 7."""

WRONG: dict[str, tuple[str, str, str]] = {
    "ends where a test catches all": ("import os\ndef f(x): os._exit(0)",
        "ok = False\ntry: f(1)\nexcept: ok = True\nassert ok", "exit"),
    "ends where a test suppresses all": ("import os\ndef f(x): os._exit(0)",
        "import contextlib\nwith contextlib.suppress(BaseException): f(1)\nassert True", "exit"),
    "ends where a test returns at last": ("import os\ndef f(x): os._exit(0)",
        "def g():\n    try: f(1)\n    finally: return 5\nassert g() == 5", "exit"),
    "plain value": ("f = 5", "assert f(1) == 5", "exception"),
    "bases that are none": ("import os\nos.write(4, b'{\"n\": 1, \"value\": {\"#\": \"dict\", \"v\": [[\"f\", 1]]"
        "}}\\n{\"n\": 2, \"error\": {\"bases\": 5}}\\n')\ndef f(x): return 0", "assert f(1) == 5", "exit"),
    "changes that are none": ("import os\ndef f(x): os.write(4, b'{\"n\": 3, \"value\": 1, \"changed\": "
        "[null, 5]}\\n')", "a = [1]\nassert f(a) == 5", "failed"),
    "exception group": ("def f(x): raise ExceptionGroup('a', [ValueError(x)])", "assert f(1) == 5", "exception"),
    "undecodable": ("def f(x): return b'\\xff'.decode()", "assert f(1) == 5", "exception"),
    "subinterpreter": ("import _xxsubinterpreters as s\ni = s.create()\ndef f(x):\n"
        "    s.run_string(i, 'import os; os._exit(0)')", "assert f(1) == 5", "exit"),
    "trace": ("import sys\ndef t(frame, event, arg): raise SystemExit(0)\ndef f(x): sys.settrace(t)",
        "assert f(1) == 5", "exit"),
    "finalizer": ("import os\nclass A:\n    def __del__(self): os._exit(0)\ndef f(x):\n    A()\n    return 5",
        "assert f(1) == 5", "exit"),
    "all signals": ("import os, signal\nfor s in range(1, 65):\n    try: signal.signal(s, lambda *a: os._exit(0))\n"
        "    except (OSError, ValueError): pass\ndef f(x):\n    while True: pass", "assert f(1) == 5", "timeout"),
    "no built-ins": ("import builtins\nbuiltins.__dict__.clear()\ndef f(x): return 5", "assert f(1) == 5", "exit"),
    "type that lies": ("class M(type):\n    __name__ = property(lambda c: 1 / 0)\n"
        "class E(Exception, metaclass=M): pass\ndef f(x): raise E", "assert f(1) == 5", "exit"),
}  # fmt: skip
"""Code, a test that it must not pass, and the outcome."""


def run(pool: CodePool, code: str, test: str) -> dict[str, Any]:
    return pool.run({"shape": "asserts", "asserts": [test], "setup": ""}, code)


@pytest.mark.parametrize("name", RIGHT)
def test_an_odd_answer_that_is_right_passes(pool: CodePool, name: str) -> None:
    assert run(pool, *RIGHT[name])["kind"] == "passed"


@pytest.mark.parametrize("name", PROGRAMS)
def test_an_odd_program_that_is_right_passes(pool: CodePool, name: str) -> None:
    tests = {"shape": "programs", "cases": [{"stdin": "3\n", "stdout": "7\n"}]}
    assert pool.run(tests, PROGRAMS[name])["kind"] == "passed"


@pytest.mark.parametrize("name", WRONG)
def test_an_odd_answer_that_is_wrong_fails_for_what_it_did(pool: CodePool, name: str) -> None:
    code, test, kind = WRONG[name]
    outcome = run(pool, code, test)
    assert outcome["kind"] == kind, outcome


def test_equal_keys_nan_and_digits_of_other_scripts() -> None:
    from selfteach.tasks.code.sandbox.judge import _as_json

    assert not equal({"1": 2}, _as_json({1: "x", "1": 2}))
    assert equal({"1": [2]}, _as_json({1: (2,)}))
    assert equal([float("nan")], [float("nan")]) and not equal(float("nan"), 1.0)
    for wrong in ("٧", "７", "0_7", "7\u20288", "0x7"):
        assert not same_output("7" if "8" not in wrong else "7\n8", wrong), wrong
    for right in ("7", "7.0", "+7", "07", ".7e1", "7\r\n", "70E-1"):
        assert same_output("7", right), right


@pytest.mark.parametrize(
    "tests",
    [[{"call": "f", "expected": 1, "tolerance": t}] for t in ("0.1", True, -1, float("inf"), [1])]
    + [[{"call": "f", "expected": {1}}], [{"call": "f", "expected": 1, "kwargs": [1]}]]
    + [{"inputs": 5, "outputs": 6}, {"inputs": ["1", "2"], "outputs": ["1"]}],
)
def test_tests_that_cannot_be_right_are_refused_as_they_are_read(tests: Any) -> None:
    with pytest.raises(UnreadableValue) as error:
        read_tests({"tests": tests}, CodeConfig())
    assert "column 'tests'" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text",
    ["```python\n" + "\n" * 50_000 + "```", "```" + "a" * 50_000, "```" + " " * 50_000 + "`"],
    ids=["lines", "letters", "spaces"],
)
def test_code_is_found_in_time_linear_in_the_text(text: str) -> None:
    begin = time.process_time()
    find_code(text, ["f"])
    assert time.process_time() - begin < 2
