"""Drives one isolated process from the judge: sends requests, and receives values or its end."""

from __future__ import annotations

import builtins
import json
import os
import select
import socket
from collections import deque
from functools import cache
from typing import Any

from .values import MUTABLE, decode, encode, shown

MAX_REPLY_BYTES = 8 << 20
"""Longest reply or output that is read; a longer one ends the process."""


class TestingOver(BaseException):
    """Signals that no more tests can be run; ``outcome`` says why.

    Test code that catches everything changes nothing: `GuestProcess.lost` is raised after it.
    """

    def __init__(self, kind: str, **details: Any) -> None:
        super().__init__(kind)
        self.outcome = {"kind": kind, **details}


class CheckFailed(AssertionError):
    """Signals that a value is not the expected one."""

    def __init__(self, expected: str, got: str, detail: str = "") -> None:
        super().__init__(detail or f"expected {expected}, got {got}")
        self.expected, self.got = expected, got


class GuestProcess:
    """Holds one process that runs an answer, and the last call made there."""

    def __init__(self, zygote: socket.socket, limits: dict[str, Any], *, streams: bool) -> None:
        requests, self._requests = os.pipe()
        self.replies, replies = os.pipe()
        self._status, status = os.pipe()
        self.stdin = self.stdout = -1
        if streams:
            stdin, self.stdin = os.pipe()
            self.stdout, stdout = os.pipe()
        else:
            stdin, stdout = os.open("/dev/null", os.O_RDONLY), os.open("/dev/null", os.O_WRONLY)
        theirs = [requests, replies, status, stdin, stdout]
        socket.send_fds(zygote, [json.dumps(limits).encode()], theirs)
        for fd in theirs:
            os.close(fd)
        self._buffer = b""
        self._number = 0
        self.last_call: tuple[str, str] | None = None
        """The last call and its value, as text."""
        self.end: dict[str, Any] = {}
        """How the process ended, once it has."""
        self.lost: TestingOver | None = None
        """Why no more tests can be run, also if a test caught the exception that said so."""

    def request(self, operation: str, *arguments: Any, **keywords: Any) -> Any:
        """Carry out an operation of `guest.Guest` and return its value.

        Raises the exception of the answer's code if it is a built-in one (or its built-in base), and
        `TestingOver` if the process has ended or its reply is none.
        """
        if self.lost is not None:
            raise self.lost
        try:
            self.send(operation, arguments, keywords)
            reply = self._reply()
            if error := reply.get("error"):
                raise _exception(error, operation)
            value = self._decoded(reply["value"])
            changeable = [*arguments, *keywords.values()]
            self._take_changes(changeable, reply.get("changed", []))
            same = reply.get("same")
            if type(same) is int and isinstance(dict(enumerate(changeable)).get(same), MUTABLE):
                value = changeable[same]
        except TestingOver as over:
            self.lost = over
            raise
        return value

    def send(self, operation: str, arguments: Any = (), keywords: Any = None) -> None:
        """Send a request. Raises `TestingOver` if nobody reads it."""
        self._number += 1
        request = {
            "n": self._number, "op": operation,
            "args": [encode(one, _number_of) for one in arguments],
            "kwargs": {name: encode(one, _number_of) for name, one in (keywords or {}).items()},
        }  # fmt: skip
        try:
            view = memoryview(json.dumps(request).encode() + b"\n")
            while view:
                view = view[os.write(self._requests, view) :]
        except BrokenPipeError:
            raise self.over() from None

    def _reply(self) -> dict[str, Any]:
        while b"\n" not in self._buffer:
            chunk = os.read(self.replies, 1 << 16)
            if not chunk:
                raise self.over()
            self._buffer += chunk
            if len(self._buffer) > MAX_REPLY_BYTES:
                self.close()
                raise TestingOver(
                    "output", detail=f"a value of more than {MAX_REPLY_BYTES >> 20} MiB"
                )
        line, _, self._buffer = self._buffer.partition(b"\n")
        return self.read_reply(line)

    def read_reply(self, line: bytes) -> dict[str, Any]:
        """Return a line as a reply. Raises `TestingOver` if it is none, or reports the limit's line."""
        try:
            reply = json.loads(line)
            if "stuck" in reply:
                over = self.over()
                over.outcome["line"] = reply["stuck"] if isinstance(reply["stuck"], int) else None
                raise over
            if reply["n"] == self._number and ("value" in reply or _describes(reply["error"])):
                return reply
        except (ValueError, KeyError, TypeError, RecursionError):
            pass
        self.close()
        raise TestingOver("exit", detail="wrote to the runner's pipe")

    def _decoded(self, data: Any) -> Any:
        def revive(number: int, kind: str, methods: list[str]) -> Remote:
            return _remote_type(*methods)(self, number, kind)

        try:
            return decode(data, revive)
        except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError, RecursionError):
            self.close()
            raise TestingOver("exit", detail="wrote to the runner's pipe") from None

    def _take_changes(self, arguments: Any, changes: list[Any]) -> None:
        """Change arguments as the call has changed them in its process."""
        for argument, change in zip(arguments, changes, strict=False):
            if not isinstance(change, list | dict) or type(
                new := self._decoded(change)
            ) is not type(argument):
                continue
            if isinstance(argument, list | bytearray):
                argument[:] = new
            elif isinstance(argument, deque):
                argument.clear()
                argument.extend(new)
            elif isinstance(argument, dict | set):
                argument.clear()
                argument.update(new)

    def over(self, patience_s: float | None = 1.0) -> TestingOver:
        """Wait for the process to end, with None until its limit, and return why."""
        self.close(patience_s)
        why, code = self.end.get("why"), self.end.get("code")
        if why in ("cpu", "idle", "wall") or code == -24:  # SIGXCPU
            return TestingOver("timeout", detail=why or "cpu")
        if why in ("threads", "files"):
            return TestingOver("exit", detail=f"too many {why}")
        if why == "abandoned":
            return TestingOver("exit", detail="closed the runner's pipe")
        if why == "broken" or code is None:
            return TestingOver("broken", detail=str(self.end.get("detail", "no report"))[:300])
        if code == -9:
            return TestingOver("memory", detail="killed by the system")
        return TestingOver("exit", detail=f"exit status {code}" if code >= 0 else f"signal {-code}")

    def close(self, patience_s: float | None = 0.0) -> None:
        """Have the process ended if it does not end by itself, and wait until it has."""
        if self._status < 0:
            return
        poll = select.poll()
        poll.register(self._status, select.POLLIN)
        poll.poll(None if patience_s is None else patience_s * 1000)
        self.finish()
        for fd in (self.replies, self.stdin, self.stdout):
            if fd >= 0:
                os.close(fd)
        report = os.read(
            self._status, 1 << 16
        )  # ends with the watchdog, which outlives the process
        os.close(self._status)
        self._status = self.stdin = self.stdout = -1
        self.end = json.loads(report) if report else {}

    def finish(self) -> None:
        """Send no more requests: the process ends, and what it has written can be read."""
        if self._requests >= 0:
            os.close(self._requests)
            self._requests = -1

    def close_stdin(self) -> None:
        """End the program's input."""
        os.close(self.stdin)
        self.stdin = -1


class Remote:
    """Stands for an object in the answer's process: it may be called and read, never compared.

    Whether it equals something would be the answer's own word. Its class has the methods of `PROTOCOLS`
    that the object's class has, so that ``callable`` and ``isinstance`` of an abstract class are right.
    """

    __slots__ = ("_guest", "_kind", "_number")

    def __init__(self, guest: GuestProcess, number: int, kind: str) -> None:
        object.__setattr__(self, "_guest", guest)
        object.__setattr__(self, "_number", number)
        object.__setattr__(self, "_kind", kind)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = self._guest.request("attribute", self, name)
        return named(value, f"{self._kind}.{name}")

    def __setattr__(self, name: str, value: Any) -> None:
        self._guest.request("set", self, name, value)

    def __str__(self) -> str:
        return str(self._guest.request("text", self))

    def __repr__(self) -> str:
        return f"<an object of type {self._kind}>"

    def _refuse(self, *_: Any) -> Any:
        raise CheckFailed("a plain value", repr(self), f"{self!r} is no plain value")

    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __bool__ = __contains__ = __hash__ = (
        _refuse
    )


def _call(remote: Remote, *arguments: Any, **keywords: Any) -> Any:
    """Call it there; the call and its value are recorded."""
    written = [shown(one, 120) for one in arguments]
    written += [f"{name}={shown(value, 120)}" for name, value in keywords.items()]
    label = f"{remote._kind}({', '.join(written)})"
    remote._guest.last_call = (label, "")
    value = remote._guest.request("call", remote, *arguments, **keywords)
    remote._guest.last_call = (label, shown(value))
    return value


def _iterate(remote: Remote) -> Any:
    return iter(remote._guest.request("items", remote))


def _count(remote: Remote) -> int:
    return remote._guest.request("len", remote)


def _item(remote: Remote, key: Any) -> Any:
    return remote._guest.request("item", remote, key)


def _next(remote: Remote) -> Any:
    return remote._guest.request("next", remote)


METHODS = {
    "__call__": _call, "__iter__": _iterate, "__next__": _next, "__len__": _count, "__getitem__": _item,
}  # fmt: skip


@cache
def _remote_type(*methods: str) -> type[Remote]:
    """Return the class of an object with some of `METHODS`."""
    return type("Remote", (Remote,), {"__slots__": ()} | {name: METHODS[name] for name in methods})


def named(value: Any, name: str) -> Any:
    """Give an object of the answer the name that messages show; return it."""
    if isinstance(value, Remote):
        object.__setattr__(value, "_kind", name)
    return value


def _number_of(value: Any) -> int:
    """Return the number of an object of the answer; tests pass no other objects."""
    if isinstance(value, Remote):
        return object.__getattribute__(value, "_number")
    raise TestingOver(
        "tests", detail=f"a test passes {type(value).__name__}, which is no plain value"
    )


class AnswerError(Exception):
    """Holds an exception of the answer's code that no built-in exception stands for."""


def _describes(error: Any) -> bool:
    """Return whether a reply's ``error`` is one that `guest` writes."""
    return isinstance(error, dict) and isinstance(error.get("bases"), list)


def _exception(described: dict[str, Any], operation: str) -> BaseException:
    """Return an exception to raise in the test, a built-in one of the same kind.

    The end of an iteration is one only where the test asks for a next element: raised by a function
    that the test maps over its inputs, it would end the test's own loop before any check.
    """
    bases, text = [str(base) for base in described["bases"]], str(described.get("text", ""))
    if "SystemExit" in bases:
        return TestingOver("exit", detail="sys.exit", error=described)
    kind = next((k for b in bases if isinstance(k := getattr(builtins, b, None), type)), None)
    is_end = kind in (StopIteration, StopAsyncIteration) and operation != "next"
    if kind is None or not issubclass(kind, Exception) or is_end:
        kind = AnswerError
    argument = described.get("argument", text)
    if issubclass(kind, BaseExceptionGroup):
        error = kind(text, [AnswerError(text)])
    else:  # some kinds cannot be initialised with a text
        error = kind.__new__(kind, argument if isinstance(argument, str | int | float) else text)
    error.described = described  # type: ignore[attr-defined]
    return error
