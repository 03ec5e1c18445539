"""Call parts of a user's own: one line for what they raise, and for results that break a contract."""

from __future__ import annotations

import functools
import sys
import traceback
from collections.abc import Callable, Mapping, Sized
from pathlib import Path
from typing import Any

from selfteach.errors import PartError, RunStopped

Check = Callable[..., str | None]
"""Gets a method's result, then its arguments; returns what is broken, or None."""
Checks = Mapping[str, Check]
"""The check of each method's result, by the method's name; of a function, by ``__call__``."""
PACKAGE = Path(__file__).resolve().parents[1]
"""Folder of this package."""


class ReportedPart:
    """Stands for a part of a user's own: its calls go through `call`, all else is the part's own."""

    def __init__(self, part: Any, label: str) -> None:
        self._part, self._label = part, label

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("_part", "_label"):  # of an instance not made yet
            raise AttributeError(name)
        return getattr(self._part, name)

    def __reduce__(self) -> tuple[Any, ...]:
        return reported, (self._part, self._label, {})


def reported(part: Any, label: str, checks: Checks) -> Any:
    """Return an object with a part's methods, which reports their errors and checks their results."""
    methods = [name for name in dir(part) if not name.startswith("_") and _is_method(part, name)]
    if callable(part):
        methods.append("__call__")
    members = {name: _method(name, checks.get(name)) for name in methods}
    return type("ReportedPart", (ReportedPart,), members)(part, label)


def call(part: Any, label: str, name: str, check: Check | None, *args: Any, **kwargs: Any) -> Any:
    """Call a method of a part. Raises `PartError` naming both if it raises, or its result is broken."""
    try:
        result = (
            part(*args, **kwargs) if name == "__call__" else getattr(part, name)(*args, **kwargs)
        )
    except RunStopped:
        raise
    except Exception as error:
        what = f"{type(error).__name__}: {error}{place_of(error, part)}"
        raise PartError(f"{label}: {_called(name, args)} raised {what}") from error
    broken = check(result, *args, **kwargs) if check is not None else None
    if broken:
        raise PartError(f"{label}: {_called(name, args)} {broken}")
    return result


def place_of(error: BaseException, part: Any = None) -> str:
    """Return file and line where an error of a user's code was raised, in brackets; empty if unknown.

    It is the last line in the part's own file, else in a file that belongs to no installed package.
    """
    if isinstance(error, SyntaxError) and error.filename:
        return f" ({Path(error.filename).name}:{error.lineno})"
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "<frozen" not in f.filename]
    source = getattr(sys.modules.get(type(part).__module__), "__file__", None)
    others = [f for f in frames if not Path(f.filename).is_relative_to(PACKAGE)]
    users = [f for f in frames if f.filename == source and f in others]
    users = users or [f for f in others if "site-packages" not in f.filename]
    return f" ({Path(users[-1].filename).name}:{users[-1].lineno})" if users else ""


def _is_method(part: Any, name: str) -> bool:
    member = getattr(type(part), name, None)
    return callable(member) and not isinstance(member, type)


def _method(name: str, check: Check | None) -> Callable[..., Any]:
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return call(self._part, self._label, name, check, *args, **kwargs)

    return method


def _called(name: str, args: tuple[Any, ...]) -> str:
    """Return a call for a person: the method, and what its arguments are."""
    return f"{'its call' if name == '__call__' else name}({', '.join(map(_brief, args))})"


@functools.singledispatch
def _brief(value: Any) -> str:
    if hasattr(value, "label") and hasattr(value, "question"):
        return f"problem {value.label!r}"
    if isinstance(value, Sized) and not isinstance(value, Mapping):
        return f"{len(value)} items"
    return type(value).__name__


@_brief.register
def _(value: str) -> str:
    return repr(value if len(value) <= 40 else value[:37] + "…")
