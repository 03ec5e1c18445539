"""Hostile answers: none passes a test, none gets out, and nothing of them is left."""

from __future__ import annotations

import os
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
    WANTED,
)

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
