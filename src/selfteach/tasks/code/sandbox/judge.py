"""Judges one answer: runs its tests against an isolated process, and says which failed and how.

What is expected never leaves this process, and every comparison is made here on plain data.
"""

from __future__ import annotations

import ast
import contextlib
import json
import math
import os
import re
import select
import socket
from decimal import Decimal, InvalidOperation
from typing import Any

from . import assertions
from .guest_process import MAX_REPLY_BYTES, CheckFailed, GuestProcess, Remote, TestingOver, named
from .values import shown

Outcome = dict[str, Any]
MAX_TRACE_BYTES = 1_000_000
"""Size of a trace, as it is written."""
MAX_INTEGER = 1 << 31
"""An integer from the answer's process that is a line or a count is smaller."""
MAX_OUTPUT_CHARS = 100_000
"""Characters of a program's output that are returned."""
NUMBER = re.compile(
    r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?|[+-]?(?:inf(?:inity)?)", re.I
)
"""Matches a number as programs print it: no digits of other scripts, and no underscores."""


def judge(request: dict[str, Any], zygote: socket.socket) -> Outcome:
    """Return the outcome of an answer's tests; ``kind`` is ``passed`` or says what went wrong.

    ``request["tests"]`` has a ``shape``: ``asserts``, ``check``, ``cases`` or ``programs``. Testing
    stops at the first test that fails. The shape ``output`` tests nothing: what a program prints is
    the ``output`` of the outcome.
    """
    progress: Outcome = {"passed": 0, "total": None}
    runs = {"asserts": _asserts, "check": _check, "cases": _cases, "programs": _programs}
    runs["output"] = _output
    try:
        runs[request["tests"]["shape"]](request, zygote, progress)
        kind: Outcome = {"kind": "passed"}
    except TestingOver as over:
        kind = _with_error(over.outcome)
    except CheckFailed as failed:
        kind = {"kind": "failed", "expected": failed.expected, "got": failed.got}
    return {**progress, **kind}


def _with_error(outcome: Outcome) -> Outcome:
    """Return an outcome with the description of its exception spread out."""
    error = outcome.pop("error", None)
    if isinstance(error, dict):
        outcome |= {
            "error": f"{error.get('type')}: {error.get('text')}".removesuffix(": ")[:500],
            "line": error.get("line") if isinstance(error.get("line"), int) else None,
        }
    return outcome


def error_outcome(described: dict[str, Any]) -> TestingOver:
    """Return the outcome of an exception of the answer's code."""
    bases = described.get("bases", [])
    kind = (
        "syntax" if described.get("syntax")
        else "memory" if "MemoryError" in bases
        else "import_refused" if isinstance(described.get("module"), str)
        else "exit" if "SystemExit" in bases
        else "exception"
    )  # fmt: skip
    detail = str(described["module"])[:80] if kind == "import_refused" else None
    return TestingOver(kind, error=described, detail=detail)


def _start(
    request: dict[str, Any], zygote: socket.socket, names: list[str]
) -> tuple[GuestProcess, Any]:
    """Load the answer's code in a new process; return it with the lines of the names."""
    guest = GuestProcess(zygote, request["limits"], streams=False)
    try:
        if traced := request["tests"].get("trace"):
            guest.request("trace", traced["call"], traced["events"])
        lines = guest.request("load", request["tests"].get("prelude", ""), request["code"], names)
    except Exception as error:
        raise error_outcome(getattr(error, "described", {})) from None
    if not isinstance(lines, dict):
        raise TestingOver("exit", detail="wrote to the runner's pipe")
    return guest, {name: line for name, line in lines.items() if line is None or is_small(line)}


def is_small(value: Any) -> bool:
    """Return whether a value of the answer's process is an integer that a line or a count can be."""
    return isinstance(value, int) and abs(value) < MAX_INTEGER


def _finish(request: dict[str, Any], guest: GuestProcess, progress: Outcome) -> None:
    """End the process; first take the trace of its last call, or of the one that was to be traced."""
    if "trace" in request["tests"] and guest.lost is None:
        with contextlib.suppress(TestingOver, Exception):  # what is no trace, too
            calls, events = guest.request("events")
            if is_small(calls):
                progress |= {"calls": calls, "trace": _plain_events(events)}
    guest.close()


def _plain_events(events: Any) -> list[Any]:
    """Return the events of a trace that are such, as plain data of bounded size."""
    plain: list[Any] = []
    left = MAX_TRACE_BYTES
    for event in events if isinstance(events, list) else []:
        match event:
            case [int(line), dict(effects)] if is_small(line):
                texts = {str(k)[:80]: v for k, v in effects.items() if isinstance(v, str)}
                short = {name: text[:200] for name, text in texts.items()}
                lines = {str(k)[:80]: v for k, v in effects.items() if is_small(v)}
                plain.append([line, lines | short])
                left -= len(json.dumps(plain[-1]))
        if left < 0:
            return plain[:-1]
    return plain


def require_callable(value: Any) -> Any:
    """Return what tests call. Raises `TestingOver` if the answer defines a plain value by that name."""
    if isinstance(value, Remote):
        return value
    text = f"{type(value).__name__!r} object is not callable"
    raise error_outcome({"type": "TypeError", "text": text})


def _record(progress: Outcome, guest: GuestProcess, test: str) -> None:
    """Record what was being tested: the test, and the last call with its value."""
    progress["test"] = test[:400]
    if guest.last_call is not None:
        progress["call"], progress["value"] = (text[:400] for text in guest.last_call)


def _asserts(request: dict[str, Any], zygote: socket.socket, progress: Outcome) -> None:
    """Run a list of statements, each a test (MBPP)."""
    tests = request["tests"]
    _run_code(request, zygote, progress, [*tests["asserts"]], tests.get("setup", ""), None)


def _check(request: dict[str, Any], zygote: socket.socket, progress: Outcome) -> None:
    """Run test code that defines ``check(candidate)``, and call it (HumanEval)."""
    tests = request["tests"]
    entry = tests["entry_point"]
    code = (
        [tests["check"], f"check({entry})"] if "def check" in tests["check"] else [tests["check"]]
    )
    _run_code(request, zygote, progress, ["\n".join(code)], tests.get("prelude", ""), entry)


def _run_code(
    request: dict[str, Any], zygote: socket.socket, progress: Outcome, sources: list[str],
    setup_source: str, entry_point: str | None,
) -> None:  # fmt: skip
    try:
        trees, setup = [ast.parse(source) for source in sources], ast.parse(setup_source)
        entry_point = entry_point or request["tests"].get("entry_point")
        names = assertions.answer_names(trees, setup, entry_point)
    except (SyntaxError, ValueError, RecursionError) as error:
        raise TestingOver("tests", detail=f"the tests are no valid Python: {error}") from None
    progress["total"] = len(sources) if len(sources) > 1 else None
    guest, lines = _start(request, zygote, names)
    progress["entry_line"] = next(iter(lines.values()), None)
    if missing := [name for name in names if name not in lines]:
        raise TestingOver("missing", detail=", ".join(missing))
    checks, asserts = assertions.Checks(), assertions.CheckedAsserts({*names, "candidate"})
    try:
        space = assertions.namespace(guest, names, setup, checks)
        for name in assertions.called(trees, entry_point) & {*names}:
            require_callable(space[name])
        assertions.with_modules(space, trees)
        for index, tree in enumerate(trees):
            checks.source = sources[index]
            exec(compile(asserts.visit(tree), "<tests>", "exec", dont_inherit=True), space)
            progress["passed"] = index + 1 if len(trees) > 1 else checks.passed
    except CheckFailed:
        progress["passed"] = max(progress["passed"], checks.passed if len(trees) == 1 else 0)
        raise
    except Exception as error:
        raise _error_in_tests(error, guest) from None
    finally:
        _record(progress, guest, checks.source)
        _finish(request, guest, progress)
    if guest.lost is not None:  # a test went on without the process
        raise guest.lost
    if guest.last_call is None:
        raise TestingOver("tests", detail="the tests call nothing of the answer")
    if asserts.of_values and not checks.of_values:
        raise TestingOver("tests", detail="with this answer they end before any check is made")
    progress["total"] = progress["passed"]


def _error_in_tests(error: Exception, guest: GuestProcess) -> BaseException:
    """Return what an exception in test code means: the answer's, a wrong value, or bad tests."""
    described = getattr(error, "described", None)
    if described is not None:
        return error_outcome(described)
    # A syntax error elsewhere than in the tests is in a text that they evaluate: the answer's.
    is_of_tests = not isinstance(error, SyntaxError) or error.filename == "<tests>"
    is_code = is_of_tests and isinstance(error, SyntaxError | ImportError | NameError)
    if guest.last_call is None or is_code:
        return TestingOver("tests", detail=f"the tests fail: {type(error).__name__}: {error}"[:300])
    got = guest.last_call[1] or "no value"
    return CheckFailed("a value that the test can use", got, f"{type(error).__name__}: {error}")


def _cases(request: dict[str, Any], zygote: socket.socket, progress: Outcome) -> None:
    """Call functions with given arguments, and compare the values with those expected."""
    cases = request["tests"]["cases"]
    progress["total"] = len(cases)
    names = list(dict.fromkeys(case["call"].partition(".")[0] for case in cases))
    guest, lines = _start(request, zygote, names)
    progress["entry_line"] = next(iter(lines.values()), None)
    if missing := [name for name in names if name not in lines]:
        raise TestingOver("missing", detail=", ".join(missing))
    try:
        for case in cases:
            _record(progress, guest, _written(case))
            value = _called(guest, case)
            _record(progress, guest, _written(case))
            if not equal(case["expected"], _as_json(value), case.get("tolerance")):
                raise CheckFailed(shown(case["expected"]), shown(value))
            progress["passed"] += 1
    except CheckFailed:
        raise
    except Exception as error:
        raise error_outcome(getattr(error, "described", {"type": str(error)})) from None
    finally:
        _finish(request, guest, progress)


def _written(case: dict[str, Any]) -> str:
    arguments = [shown(one, 120) for one in case.get("args", [])]
    arguments += [f"{name}={shown(one, 120)}" for name, one in case.get("kwargs", {}).items()]
    return f"{case['call']}({', '.join(arguments)})"


def _called(guest: GuestProcess, case: dict[str, Any]) -> Any:
    """Call ``f``, or ``Class.method`` of a new object."""
    name, _, method = case["call"].partition(".")
    function = require_callable(named(guest.request("get", name), name))
    if method:
        function = getattr(function(), method)
    return function(*case.get("args", []), **case.get("kwargs", {}))


def _as_json(value: Any) -> Any:
    """Return a value as JSON would write it: tuples are lists, keys are texts.

    A dictionary in which two keys would be the same text stays as it is.
    """
    if isinstance(value, list | tuple):
        return [_as_json(one) for one in value]
    if isinstance(value, dict):
        written = {_as_key(key): _as_json(one) for key, one in value.items()}
        return written if len(written) == len(value) else value
    return value


def _as_key(key: Any) -> Any:
    plain = key is None or isinstance(key, bool | int | float)
    return json.dumps(key) if plain else key


def equal(expected: Any, got: Any, tolerance: float | None = None) -> bool:
    """Return whether a value is the expected one: Python's ``==``, and no number is a truth value.

    NaN is NaN. With ``tolerance`` numbers may differ by it, absolutely or relatively.
    """
    if isinstance(expected, list) and isinstance(got, list):
        pairs = zip(expected, got, strict=False)
        return len(expected) == len(got) and all(equal(a, b, tolerance) for a, b in pairs)
    if isinstance(expected, dict) and isinstance(got, dict):
        keys = expected.keys() == got.keys()
        return keys and all(equal(expected[key], got[key], tolerance) for key in expected)
    if isinstance(expected, bool) != isinstance(got, bool):
        return False
    if tolerance and isinstance(expected, int | float) and isinstance(got, int | float):
        try:
            return math.isclose(expected, got, rel_tol=tolerance, abs_tol=tolerance)
        except OverflowError:
            return False
    if isinstance(expected, float) and isinstance(got, float) and math.isnan(expected):
        return math.isnan(got)
    return bool(expected == got)


def _programs(request: dict[str, Any], zygote: socket.socket, progress: Outcome) -> None:
    """Run the answer as a program for each input, and compare what it prints."""
    cases = request["tests"]["cases"]
    progress["total"] = len(cases)
    for case in cases:
        progress |= {"test": f"stdin: {shown(case['stdin'], 360)}"}
        guest = GuestProcess(zygote, request["limits"], streams=True)
        guest.send("program", (request["tests"].get("prelude", ""), request["code"]))
        output, reply = communicate(guest, case["stdin"].encode())
        text = output.decode("utf-8", "replace")
        progress["value"] = shown(text)
        _require_end(guest, reply)
        if not same_output(case["stdout"], text):
            raise CheckFailed(shown(case["stdout"]), shown(text))
        progress["passed"] += 1


def _output(request: dict[str, Any], zygote: socket.socket, progress: Outcome) -> None:
    """Run a program on an input, and record what it prints."""
    guest = GuestProcess(zygote, request["limits"], streams=True)
    guest.send("program", ("", request["code"]))
    output, reply = communicate(guest, request["tests"]["stdin"].encode())
    progress["output"] = output.decode("utf-8", "replace")[:MAX_OUTPUT_CHARS]
    _require_end(guest, reply)


def _require_end(guest: GuestProcess, reply: bytes) -> None:
    """Raise `TestingOver` unless a program has ended by itself, without an error.

    Its report alone is its own word: the program could write one, and go on.
    """
    if reply and (error := guest.read_reply(reply).get("error")):
        raise error_outcome(error)
    over = guest.over(patience_s=None)
    if guest.end.get("why") is not None or guest.end.get("code") != 0:
        raise over


def communicate(guest: GuestProcess, data: bytes) -> tuple[bytes, bytes]:
    """Give a program its input; return its output and its report, empty if it ended without one.

    Both end with the process, which has a limit of time.
    """
    output, reply, waiting = bytearray(), bytearray(), memoryview(data)
    poll = select.poll()
    os.set_blocking(guest.stdin, False)
    for fd, events in ((guest.stdin, select.POLLOUT), (guest.stdout, select.POLLIN)):
        poll.register(fd, events)
    poll.register(guest.replies, select.POLLIN)
    open_ends = {guest.stdout, guest.replies}
    while open_ends:
        for fd, _ in poll.poll():
            if fd == guest.stdin:
                try:
                    waiting = waiting[os.write(fd, waiting[: 1 << 16]) :]
                except BrokenPipeError:
                    waiting = waiting[:0]
                if not waiting:
                    poll.unregister(fd)
                    guest.close_stdin()
                continue
            chunk = os.read(fd, 1 << 16)
            (output if fd == guest.stdout else reply).extend(chunk)
            if not chunk:
                poll.unregister(fd)
                open_ends.discard(fd)
            if len(output) + len(reply) > MAX_REPLY_BYTES:
                guest.close()
                limit = f"output of more than {MAX_REPLY_BYTES >> 20} MiB"
                raise TestingOver("output", detail=limit)
    return bytes(output), bytes(reply).partition(b"\n")[0]


def same_output(expected: str, got: str) -> bool:
    """Return whether two outputs are equal, line by line without outer space; numbers by value."""
    lines, other = (
        [line.strip() for line in re.split(r"\r\n|\n|\r", text.strip())] for text in (expected, got)
    )
    return len(lines) == len(other) and all(map(_same_line, lines, other))


def _same_line(expected: str, got: str) -> bool:
    words, other = expected.split(), got.split()
    return words == other or (len(words) == len(other) and all(map(_same_word, words, other)))


def _same_word(expected: str, got: str) -> bool:
    if expected == got:
        return True
    numbers = len(got) < 1000 and NUMBER.fullmatch(expected) and NUMBER.fullmatch(got)
    try:
        return bool(numbers) and Decimal(expected) == Decimal(got)
    except InvalidOperation:  # an exponent beyond all numbers
        return False
