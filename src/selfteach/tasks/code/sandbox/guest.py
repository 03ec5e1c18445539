"""Runs an answer's code in the isolated process: carries out requests, and returns values as data.

Nothing here decides whether a test is passed, and nothing secret is in this process: it gets inputs,
never what is expected. Whatever the answer does to this module changes only what it returns.
"""

from __future__ import annotations

import atexit
import builtins
import gc
import json
import os
import random
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib.abc import MetaPathFinder
from types import CodeType, ModuleType
from typing import Any

from .line_tracer import LineTracer
from .values import MUTABLE, decode, encode

ANSWER, PRELUDE = "<answer>", "<prelude>"
MAX_ITEMS = 1_000_000
"""Elements that are read from an iterator."""
MAX_TEXT = 500
RUNNER_MODULES = ("ctypes", "_ctypes", "sandbox", "resource", "socket", "_socket")


class RefusedImports(MetaPathFinder):
    """Refuses imports by name, for a message that says so; the kernel refuses what they would do."""

    def __init__(self, names: list[str]) -> None:
        self._names = set(names)

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> None:
        """Raise `ModuleNotFoundError` for a refused module; leave others to Python's finders."""
        if fullname in self._names or fullname.partition(".")[0] in self._names:
            raise ModuleNotFoundError(f"import of {fullname!r} is refused here", name=fullname)


def _prepare(refused: list[str]) -> None:
    for name in [*sys.modules]:
        if name.partition(".")[0] in RUNNER_MODULES:
            del sys.modules[name]
    sys.meta_path.insert(0, RefusedImports(refused))
    sys.argv = ["answer.py"]
    random.seed(0)
    # New streams: those of the interpreter are on other files than these descriptors now.
    sys.stdin = open(0, encoding="utf-8", errors="surrogateescape", closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", encoding="utf-8", errors="surrogateescape", closefd=False)  # noqa: SIM115
    sys.__stdin__, sys.__stdout__ = sys.stdin, sys.stdout  # pyright: ignore[reportAttributeAccessIssue]
    builtins.exit = builtins.quit = sys.exit  # what `site`, which is not imported, defines


class Guest:
    """Holds the answer's module, and the objects that requests name by number."""

    def __init__(self, replies_fd: int, refused: list[str]) -> None:
        _prepare(refused)
        signal.signal(signal.SIGXCPU, self.report_limit)
        self._fd = replies_fd
        self._objects: list[Any] = []
        self._number = 0
        self._module = ModuleType("answer")
        self._calls = 0
        self._traced: tuple[int, int] | None = None
        self._tracer = LineTracer(ANSWER, 0)
        self._operations: dict[str, Callable[..., Any]] = {
            "load": self._load, "program": self._program, "get": self._get, "call": self._call,
            "attribute": getattr, "set": setattr, "items": self._items, "len": len,
            "item": lambda value, key: value[key], "text": str, "next": next,
            "trace": self._trace, "events": lambda: [self._calls, self._tracer.events],
        }  # fmt: skip

    def serve(self, requests_fd: int) -> None:
        """Carry out requests until the pipe ends or a program has; never returns."""
        status = 70
        try:
            with os.fdopen(requests_fd, "rb") as requests:
                while line := requests.readline():
                    request = json.loads(line)
                    is_program, is_right = request["op"] == "program", self.answer(request)
                    if is_program:  # its end is the process's: what hangs now is not over
                        os._exit(0 if is_right else 1)
            status = 0
        finally:
            os._exit(status)

    def answer(self, request: dict[str, Any]) -> bool:
        """Carry out one request, and write one line with its value or its exception.

        Returns whether it is a value.
        """
        self._number = request.pop("n")
        operation = self._operations[request.pop("op")]
        arguments = [decode(one, self._revive) for one in request.pop("args", [])]
        named = {k: decode(v, self._revive) for k, v in request.pop("kwargs", {}).items()}
        changeable = [*arguments, *named.values()]
        before = json.dumps(_mutable(changeable, self._keep))
        try:
            value = operation(*arguments, **named)
            reply = {"value": encode(value, self._keep)}
            after = _mutable(changeable, self._keep)
            if json.dumps(after) != before:
                reply["changed"] = after
            same = [i for i, one in enumerate(changeable) if one is value]
            reply |= {"same": same[0]} if same and isinstance(value, MUTABLE) else {}
            self._write(reply)
            return True
        except BaseException as error:  # SystemExit and the answer's own included
            reply = {"error": _described(error)}
            del error
            self._write(reply)
            return False

    def report_limit(self, signal_number: int, frame: Any) -> None:
        """Report the line of the answer that runs when the CPU time is used up, and end."""
        while frame is not None and frame.f_code.co_filename != ANSWER:
            frame = frame.f_back
        self._write({"stuck": frame.f_lineno if frame else None})
        os._exit(1)

    def _write(self, reply: dict[str, Any]) -> None:
        line = json.dumps({"n": self._number, **reply}).encode() + b"\n"
        view = memoryview(line)
        while view:
            view = view[os.write(self._fd, view) :]

    def _keep(self, value: Any) -> int:
        self._objects.append(value)
        return len(self._objects) - 1

    def _revive(self, number: int, *_: Any) -> Any:
        return self._objects[number]

    def _load(self, prelude: str, code: str, names: list[str]) -> dict[str, int | None]:
        """Run the answer's module; return the line of each name that it defines."""
        sys.modules["answer"] = self._module
        space = self._module.__dict__
        exec(_compiled(prelude, PRELUDE), space)
        before = {name: space.get(name) for name in names}
        exec(_compiled(code, ANSWER), space)
        return {
            name: _line_of(space[name])
            for name in names
            if name in space and space[name] is not before[name]
        }

    def _program(self, prelude: str, code: str) -> None:
        """Run the answer's code as a program, with its threads and exit functions."""
        self._module.__name__ = "__main__"
        sys.modules["__main__"] = self._module
        space = self._module.__dict__
        try:
            exec(_compiled(prelude, PRELUDE), space)
            exec(_compiled(code, ANSWER), space)
        except SystemExit as end:
            if end.code not in (None, 0):
                raise
        except Exception:
            with suppress(Exception):  # what was printed before is a part of what happened
                sys.stdout.flush()
            raise
        for thread in threading.enumerate():
            if thread is not threading.current_thread() and not thread.daemon:
                thread.join()
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.__stdout__):  # the program may have replaced one
            if stream is not None and not stream.closed:
                stream.flush()
        sys.stdout = sys.__stdout__
        space.clear()  # open files are written, and objects deleted, as where Python ends
        gc.collect()
        if sys.stdout is not None and not sys.stdout.closed:
            sys.stdout.flush()

    def _get(self, name: str) -> Any:
        space = self._module.__dict__
        if name in space:
            return space[name]
        return getattr(builtins, name)

    def _call(self, function: Any, *arguments: Any, **named: Any) -> Any:
        self._calls += 1
        if self._traced is None or self._traced[0] not in (0, self._calls):
            return function(*arguments, **named)
        self._tracer = LineTracer(ANSWER, self._traced[1])
        return self._tracer.run(function, *arguments, **named)

    def _trace(self, call: int, limit: int) -> None:
        """Record the lines of a call, counted from 1, or with 0 of each, for the last one's."""
        self._traced = call, limit

    def _items(self, value: Any) -> list[Any]:
        def bounded(iterator: Iterator[Any]) -> Iterator[Any]:
            for _ in range(MAX_ITEMS):
                try:
                    yield next(iterator)
                except StopIteration:
                    return
            raise MemoryError(f"more than {MAX_ITEMS:,} elements")

        return list(bounded(iter(value)))


def _mutable(arguments: list[Any], keep: Callable[[Any], int]) -> list[Any]:
    """Return the encoded arguments that a call can change; None in the place of others."""
    return [encode(one, keep) if isinstance(one, MUTABLE) else None for one in arguments]


def _compiled(code: str, name: str) -> CodeType:
    # A file may begin with a byte order mark; and not this module's future statements.
    return compile(code.removeprefix("\ufeff"), name, "exec", dont_inherit=True)


def _line_of(value: Any) -> int | None:
    code = getattr(value, "__code__", None)
    if not isinstance(code, CodeType) or code.co_filename != ANSWER:
        return None
    return code.co_firstlineno


def _described(error: BaseException) -> dict[str, Any]:
    """Return an exception's type, text, and the last line of the answer's code that it passed."""
    line, trace = None, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == ANSWER:
            line = trace.tb_lineno
        trace = trace.tb_next
    syntax = False
    if isinstance(error, SyntaxError) and error.filename == ANSWER:
        syntax, line = True, error.lineno
    try:
        text = str(error)[:MAX_TEXT]
    except BaseException:
        text = ""
    alone = error.args[0] if len(error.args) == 1 else None
    bases = [base.__name__ for base in type(error).__mro__ if base.__module__ == "builtins"]
    return {
        "type": type(error).__name__[:80],
        "bases": bases,
        "text": text,
        "argument": alone if type(alone) in (str, int, float) else text,
        "line": line,
        "syntax": syntax,
        "module": getattr(error, "name", None) if isinstance(error, ImportError) else None,
    }
