"""Records what each executed line of an answer does: the variables that it changes, what it returns.

It runs in the isolated process beside the answer, which could forge what it records: a trace is a hint,
and whether a program is right is decided by its tests alone.
"""

from __future__ import annotations

import re
import sys
import zlib
from collections.abc import Callable
from types import FrameType
from typing import Any

ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
MAX_TEXT = 80
PLAIN = (
    int,
    float,
    complex,
    str,
    bytes,
    bytearray,
    list,
    tuple,
    dict,
    set,
    frozenset,
    range,
    type(None),
)

Event = list[Any]
"""``[line, {variable: text}]``. Keys that are no variables: ``return``, ``raise``, and ``0next``, the
line that the function runs then."""


class TraceFull(BaseException):
    """Ends a call that has executed more lines than are recorded."""


class LineTracer:
    """Records the executed lines of one call, those of the file ``name`` alone.

    They are in the order in which they end: a line that calls a function comes after the function's, so
    that the first of two traces' events that differ is where they part.
    """

    def __init__(self, name: str, limit: int) -> None:
        self._name, self._limit = name, limit
        self._open: dict[FrameType, tuple[Event, dict[str, str]]] = {}
        """The line that each function runs, and its variables before it."""
        self.events: list[Event] = []

    def run(self, function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        """Call a function and record its lines. Raises `TraceFull` at the limit."""
        sys.settrace(self._enter)
        try:
            return function(*arguments, **named)
        finally:
            sys.settrace(None)
            self._open.clear()

    def _enter(self, frame: FrameType, event: str, _: Any) -> Any:
        return self._step if frame.f_code.co_filename == self._name else None

    def _step(self, frame: FrameType, event: str, value: Any) -> Any:
        if event == "exception":
            if frame in self._open:
                self._open[frame][0][1]["raise"] = getattr(value[0], "__name__", "?")[:MAX_TEXT]
            return self._step
        variables = {name: text_of(one) for name, one in frame.f_locals.items()}
        if frame in self._open:
            finished, before = self._open.pop(frame)
            self.events.append(finished)
            effects = finished[1]
            effects.update({n: t for n, t in variables.items() if before.get(n) != t})
            if event == "line":
                effects["0next"] = frame.f_lineno
            elif "raise" not in effects:
                effects["return"] = text_of(value)
        if event == "line":
            if len(self.events) >= self._limit:
                sys.settrace(None)
                raise TraceFull
            self._open[frame] = [frame.f_lineno, {}], variables
        return self._step


def text_of(value: Any) -> str:
    """Return a text that is equal for equal plain values; of other objects mostly the type."""
    try:
        text = repr(sorted(value, key=repr)) if isinstance(value, set | frozenset) else repr(value)
        text = ADDRESS.sub("", text) if isinstance(value, PLAIN) else f"<{type(value).__name__}>"
    except Exception:
        text = f"<{type(value).__name__}>"
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]}…{zlib.crc32(text.encode())}"
