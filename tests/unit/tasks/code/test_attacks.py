"""Hostile answers: none passes a test, none gets out, and nothing of them is left."""

from __future__ import annotations

import os
import shutil
import subprocess
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
from code_attacks import (
    BAD_PROGRAMS,
    BOMBS,
    ESCAPE_FRAME,
    ESCAPES,
    FORGERIES,
    TRICKS,
    WANTED,
)

from selfteach.tasks.code import isolation
from selfteach.tasks.code.code_pool import CodePool

TESTS = {"shape": "asserts", "asserts": [f"assert f(3) == {WANTED}"], "setup": ""}
PROGRAM = {"shape": "programs", "cases": [{"stdin": "3 4\n", "stdout": "7\n"}]}


def descendants(pid: int) -> list[str]:
    """Return the names of the processes that a process has started, and those that they have."""
    names = []
    for folder in Path("/proc").iterdir():
        try:
            name, _, fields = (folder / "stat").read_text().rpartition(")")
        except OSError:
            continue
        if folder.name.isdigit() and int(fields.split()[1]) == pid:
            names += [name.partition("(")[2], *descendants(int(folder.name))]
    return names


def attack(pool: CodePool, code: str, tests: dict[str, Any] = TESTS) -> dict[str, Any]:
    """Return the outcome of an attack; a right answer must be judged right after it."""
    return pool.run(tests, code)


def test_a_right_answer_passes(pool: CodePool) -> None:
    assert pool.run(TESTS, f"def f(x): return {WANTED}")["kind"] == "passed"
    assert pool.run(PROGRAM, "print(sum(map(int, input().split())))")["kind"] == "passed"


@pytest.mark.parametrize("name", FORGERIES)
def test_no_forgery_passes_a_test(pool: CodePool, name: str) -> None:
    outcome = attack(pool, FORGERIES[name])
    assert outcome["kind"] not in ("passed", "tests", "broken"), outcome


@pytest.mark.parametrize("shadow", ["abs", "set", "len", "sorted", "math", "isinstance", "round"])
def test_an_answer_cannot_replace_what_a_test_calls(pool: CodePool, shadow: str) -> None:
    used = {"abs": "abs(f(3) - 5) < 1", "set": "set(f(3)) == {1}", "len": "len(f(3)) == 4",
            "sorted": "sorted(f(3)) == [1]", "math": "math.isclose(f(3), 5)",
            "isinstance": "isinstance(f(3), str)", "round": "round(f(3)) == 5"}  # fmt: skip
    code = (
        f"class T:\n    def __getattr__(self, n): return lambda *a: True\n{shadow} = lambda *a: 0\n"
    )
    code += "def f(x): return [2]"
    tests = {"shape": "asserts", "asserts": [f"assert {used[shadow]}"], "setup": ""}
    assert pool.run(tests, code)["kind"] == "failed"


def test_an_answer_that_empties_its_argument_changes_nothing_of_what_is_expected(
    pool: CodePool,
) -> None:
    test = "x = [3, 1, 2]\nassert f(x) == sorted(x)"
    tests = {"shape": "asserts", "asserts": [test], "setup": ""}
    assert pool.run(tests, "def f(x):\n    x.clear()\n    return []")["kind"] == "failed"
    assert pool.run(tests, "def f(x): return sorted(x)")["kind"] == "passed"


@pytest.mark.parametrize(
    "test",
    [
        "assert all(map(f, [2, 3, 5]))",
        "assert not list(filter(f, [2, 3]))",
        "for a, b in zip(map(f, [1, 2]), [3, 4]): assert a == b",
        "for a in iter(f, None): assert a == 3",
        "import itertools\nassert sum(itertools.starmap(f, [(1,)])) == 0",
        "assert all(x == 3 for x in map(f(1).g, [1]))",
        "for a in map(lambda x: len(f(x)), [1]): assert a == 3",
        "for a in map(lambda x: f(x)[0], [1]): assert a == 3",
        "for a in map(lambda x: f(x).a, [1]): assert a == 3",
        "for a in map(list, [f(1)]): assert a == 3",
    ],
)
def test_an_answer_cannot_end_a_test_s_own_loop(pool: CodePool, test: str) -> None:
    for end in ("StopIteration", "type('E', (StopIteration,), {})"):
        code = f"def f(x=None): raise {end}"
        if "f(1)" in test or "f(x)" in test:
            code = f"def stop(*a): raise {end}\nclass A:\n    a = property(stop)\n"
            code += "    __len__ = __getitem__ = __iter__ = g = stop\ndef f(x): return A()"
        outcome = pool.run({"shape": "asserts", "asserts": [test], "setup": ""}, code)
        assert outcome["kind"] == "exception" and outcome["line"] == 1, outcome


def test_the_end_of_an_answer_s_iterator_is_one(pool: CodePool) -> None:
    code = "def f(n):\n    yield from range(n)\nclass It:\n    def __iter__(self): return self\n"
    code += "    def __next__(self): raise StopIteration\ndef g(): return It()"
    tests = ["assert next(f(1)) == 0", "assert next(f(0), 7) == 7", "assert list(g()) == []",
             "g = f(1)\nnext(g)\ntry:\n    next(g)\n    assert False\nexcept StopIteration: pass",
             "assert [*zip(f(3), 'ab')] == [(0, 'a'), (1, 'b')]"]  # fmt: skip
    for test in tests:
        outcome = pool.run({"shape": "asserts", "asserts": [test], "setup": ""}, code)
        assert outcome["kind"] == "passed", (test, outcome)


@pytest.mark.parametrize(
    "test",
    [
        "for a, b in zip(f(3), [1, 2]): assert a == b",
        "def check(candidate):\n    assert True, 'prints'\n    for a in candidate(3): assert a == 1",
        "for a in f(3):\n    assert a == 1\nassert True",
    ],
)
def test_tests_that_check_nothing_pass_nobody(pool: CodePool, test: str) -> None:
    tests = {"shape": "asserts", "asserts": [test], "setup": ""}
    if "check" in test:
        tests = {"shape": "check", "check": test, "entry_point": "f"}
    outcome = pool.run(tests, "def f(x): return []")
    assert outcome["kind"] == "tests" and "before any check" in outcome["detail"], outcome
    assert pool.run(tests, "def f(x): return [1]")["kind"] == "passed"


@pytest.mark.parametrize(
    "test", ["assert x == f(x)", "assert f(x) == x", "assert f(x) == sorted(x)"]
)
@pytest.mark.parametrize("kind", ["list", "collections.deque"])
def test_what_is_expected_is_read_before_the_call(pool: CodePool, test: str, kind: str) -> None:
    tests = {"shape": "asserts", "asserts": [f"x = {kind}([1, 2])\n{test}"], "setup": ""}
    code = "def f(x):\n    x.clear()\n    return type(x)()"
    assert pool.run(tests, code)["kind"] == "failed"


@pytest.mark.parametrize("name", TRICKS)
def test_operators_and_protocols_of_an_answer_decide_nothing(pool: CodePool, name: str) -> None:
    code, test = TRICKS[name]
    outcome = pool.run({"shape": "asserts", "asserts": [test], "setup": ""}, code)
    assert outcome["kind"] in ("failed", "exception"), outcome


CLAIMS = {
    "callable": ("callable(f(3))", "__call__"),
    "iterable": ("isinstance(f(3), collections.abc.Iterable)", "__iter__"),
    "iterator": ("isinstance(f(3), collections.abc.Iterator)", "__next__"),
    "sized": ("isinstance(f(3), collections.abc.Sized)", "__len__"),
    "has a method": ("hasattr(f(3), '__getitem__')", "__getitem__"),
    "is another": ("f(x) is not x", None),
    "is another by name": ("not any(a is b for a, b in [(f(a=x), x)])", None),
}


@pytest.mark.parametrize("name", CLAIMS)
def test_an_object_of_an_answer_can_what_its_class_defines(pool: CodePool, name: str) -> None:
    test, method = CLAIMS[name]
    tests = {"shape": "asserts", "asserts": [f"x = [3]\nassert {test}"], "setup": ""}
    if method is None:
        wrong, right = "def f(a): return a", "def f(a): return [*a]"
    else:
        wrong = "class A:\n    def keys(self): pass\ndef f(x): return A()"
        right = f"class A:\n    __iter__ = {method} = id\ndef f(x): return A()"
    assert pool.run(tests, wrong)["kind"] == "failed"
    assert pool.run(tests, right)["kind"] == "passed"


def test_what_a_function_returns_is_its_argument_if_it_is(pool: CodePool) -> None:
    test = "x = {1: [2]}\ny = f(x)\ny[5] = 6\nassert x == {1: [2], 3: 4, 5: 6} and y is x"
    tests = {"shape": "asserts", "asserts": [test], "setup": ""}
    assert pool.run(tests, "def f(x):\n    x[3] = 4\n    return x")["kind"] == "passed"
    assert pool.run(tests, "def f(x): return {**x, 3: 4}")["kind"] == "failed"
    forged = 'import os\ndef f(x): os.write(4, b\'{"n": 3, "value": 0, "same": %s}\\n\')'
    for same in ("7", "-1", "true", "[]", "1e9", "null"):
        tests = {"shape": "asserts", "asserts": ["assert f([1]) == 5"], "setup": ""}
        assert pool.run(tests, forged % same)["kind"] in ("failed", "exit"), same


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_end_at_their_limit(pool: CodePool, name: str) -> None:
    code, kinds = BOMBS[name]
    outcome = attack(pool, code)
    assert outcome["kind"] in kinds, outcome


@pytest.mark.parametrize("name", ESCAPES)
def test_nothing_gets_out(pool: CodePool, name: str, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("key")
    code = ESCAPE_FRAME.replace("BODY", textwrap.indent(ESCAPES[name], "    ").strip())
    case = {"call": "attack", "expected": []}
    case["args"] = [str(secret), str(tmp_path), str(Path.home())]
    outcome = attack(pool, code, {"shape": "cases", "cases": [case]})
    assert outcome["kind"] == "passed", outcome
    assert secret.read_text() == "key" and list(tmp_path.iterdir()) == [secret]


def test_no_file_can_be_made_in_a_box_of_bubblewrap_without_landlock(tmp_path: Path) -> None:
    """The mounts alone, as on a kernel without Landlock: the scratch folder is mounted per answer."""
    program = shutil.which("bwrap")
    if program is None:
        pytest.skip("no bubblewrap here")
    settings = isolation.settings("bubblewrap", str(tmp_path))
    code = "import os, sys\nfor folder in sys.argv[1:]:\n    try: open(folder + '/probe', 'w')\n"
    code += "    except OSError: continue\n    print(folder)\nopen('/dev/null', 'w').write('x')"
    folders = ["/", "/dev", "/dev/shm", "/dev/pts", "/tmp", "/scratch", "/proc", str(tmp_path)]
    command = [*settings["wrapper"], *settings["python"], "-c", code, *folders]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode and "Permission denied" in run.stderr:
        pytest.skip("bubblewrap cannot make namespaces here")
    assert (run.returncode, run.stdout) == (0, ""), run


@pytest.mark.parametrize("name", BAD_PROGRAMS)
def test_no_wrong_program_passes(pool: CodePool, name: str) -> None:
    assert attack(pool, BAD_PROGRAMS[name], PROGRAM)["kind"] not in ("passed", "broken")


def test_nothing_is_left_of_any_attack(pool: CodePool) -> None:
    """Supervisors and their zygotes are the only processes, and the scratch folders are empty."""
    running = Path(os.path.realpath("/proc/self/exe")).name
    names: list[str] = []
    for _ in range(100):  # what was killed last is still being reaped
        workers = [worker._process.pid for worker in list(pool._idle.queue) if worker._process]
        names = [name for pid in workers for name in descendants(pid)]
        if len(names) <= 6:
            break
        time.sleep(0.1)
    assert len(names) <= 6, names
    assert set(names) <= {"bwrap", "python3", "python3.11", "python", running}, names
    assert os.listdir(pool._scratch) == []  # noqa: PTH208
