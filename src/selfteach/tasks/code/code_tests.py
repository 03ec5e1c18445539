"""Reads unit tests from the columns of a row, in the shapes of well-known data sets, into one form.

A problem's tests are in its ``meta["code_tests"]``, a table with a ``shape``:

- ``asserts``: statements, each a test, with ``setup`` (MBPP);
- ``check``: code that defines ``check(candidate)``, with ``entry_point`` and ``prelude`` (HumanEval);
- ``cases``: ``{"call": "f", "args": […], "expected": …}``, also of methods (``"Solution.f"``);
- ``programs``: ``{"stdin": …, "stdout": …}`` (LiveCodeBench, APPS).
"""

from __future__ import annotations

import ast
import base64
import io
import json
import math
import pickle
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from selfteach.config.code_section import CodeConfig
from selfteach.tasks.sources.columns import column_value
from selfteach.tasks.sources.source_row import MissingValue, Row, UnreadableValue
from selfteach.types import Problem

Tests = dict[str, Any]
KEY = "code_tests"
"""The key of a problem's ``meta`` that holds its tests."""
TEST_COLUMNS = (
    "tests",
    "test_list",
    "test",
    "private_test_cases",
    "public_test_cases",
    "input_output",
)
"""Names of a column of tests, the first that a row has."""
LIVECODEBENCH_PRELUDE = """\
from string import *
from re import *
from datetime import *
from collections import *
from heapq import *
from bisect import *
from copy import *
from math import *
from random import *
from statistics import *
from itertools import *
from functools import *
from operator import *
from io import *
from sys import *
from json import *
from builtins import *
from typing import *
import bisect, collections, copy, datetime, functools, heapq, io, itertools, json, math, operator
import random, re, statistics, string, sys, typing
sys.setrecursionlimit(50_000)
"""
"""What LiveCodeBench runs before an answer: its starter code names ``List`` without importing it. The
modules come last: ``bisect`` is the module, and not its function."""
MAX_UNPACKED_BYTES = 256 << 20
"""Size of unpacked tests."""


def with_tests(problem: Problem, row: Row, config: CodeConfig) -> Problem:
    """Return a problem with the tests of its row. Raises `MissingValue` if none can be read."""
    return replace(problem, meta={**problem.meta, KEY: read_tests(row.values, config)})


def read_tests(values: Mapping[str, Any], config: CodeConfig) -> Tests:
    """Return the tests of a row. Raises `MissingValue` if there are none that can be read."""
    stored = values.get("meta")
    if config.tests is None and isinstance(stored, Mapping) and KEY in stored:
        return dict(stored[KEY])
    column = config.tests or next((name for name in TEST_COLUMNS if values.get(name)), None)
    if column is None:
        raise MissingValue(
            f"no column of tests (none of {', '.join(TEST_COLUMNS)}): name it, data.code.tests"
        )
    tests = _tests(column, _unpacked(column_value(values, column)), values, config)
    if column == "private_test_cases" and config.tests is None and values.get("public_test_cases"):
        public = _unpacked(values["public_test_cases"])
        tests["cases"] = [*_cases("public_test_cases", public, values, config), *tests["cases"]]
    if prelude := _text(values, config.prelude):
        tests["prelude"] = _python(prelude, config.prelude or "")
    elif column.endswith("_test_cases"):
        tests["prelude"] = LIVECODEBENCH_PRELUDE
    return tests


def entry_names(tests: Tests) -> list[str]:
    """Return the names that an answer must define, as far as the tests name them."""
    if tests["shape"] == "cases":
        return list(dict.fromkeys(case["call"].partition(".")[0] for case in tests["cases"]))
    return [tests["entry_point"]] if tests.get("entry_point") else []


def _tests(column: str, value: Any, values: Mapping[str, Any], config: CodeConfig) -> Tests:
    entry = _entry_point(values, config)
    if isinstance(value, str) and value.strip():
        if entry is None:
            raise MissingValue(
                f"column {column!r} is test code, and no column names the entry point"
            )
        return {"shape": "check", "check": _python(value, column), "entry_point": entry}
    if isinstance(value, Sequence) and value and all(isinstance(one, str) for one in value):
        for one in value:
            _python(one, column)
        setup = _python(_setup(values, config), "setup")
        return {"shape": "asserts", "asserts": [*value], "setup": setup, "entry_point": entry}
    cases = _cases(column, value, values, config)
    shape = "programs" if "stdin" in cases[0] else "cases"
    if any(("stdin" in case) != (shape == "programs") for case in cases):
        raise UnreadableValue(f"column {column!r} mixes calls of functions and runs of programs")
    return {"shape": shape, "cases": cases}


def _cases(
    column: str, value: Any, values: Mapping[str, Any], config: CodeConfig
) -> list[dict[str, Any]]:
    """Return cases of calls or programs."""
    if isinstance(value, Mapping) and {"inputs", "outputs"} <= value.keys():
        if value.get("fn_name"):
            raise UnreadableValue(
                f"column {column!r} calls a function by APPS' rules: not supported"
            )
        given, wanted = value["inputs"], value["outputs"]
        if not isinstance(given, list) or not isinstance(wanted, list) or len(given) != len(wanted):
            raise UnreadableValue(
                f"column {column!r}: inputs and outputs are no lists of one length"
            )
        pairs = zip(given, wanted, strict=True)
        value = [{"stdin": one, "stdout": other} for one, other in pairs]
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise UnreadableValue(f"column {column!r} is no list of tests")
    return [_case(column, one, values, config) for one in value]


def _case(column: str, case: Any, values: Mapping[str, Any], config: CodeConfig) -> dict[str, Any]:
    match case:
        case {"call": str(call), "expected": _}:
            return _call(column, call, case)
        case {"testtype": "functional", "input": str(given), "output": str(expected)}:
            return _functional(column, given, expected, values, config)
        case {"stdin": given, "stdout": expected} | {"input": given, "output": expected}:
            return {"stdin": _joined(given), "stdout": _joined(expected)}
    raise UnreadableValue(
        f'column {column!r}: a test is {{"call": …, "args": […], "expected": …}} or '
        '{"stdin": …, "stdout": …}'
    )


def _call(column: str, call: str, case: Mapping[str, Any]) -> dict[str, Any]:
    known = {"call", "args", "kwargs", "expected", "tolerance"}
    if unknown := sorted(case.keys() - known):
        raise UnreadableValue(f"column {column!r}: a test has an unknown key {unknown[0]!r}")
    if not all(part.isidentifier() for part in call.split(".")) or call.count(".") > 1:
        raise UnreadableValue(f"column {column!r}: {call!r} names no function or method")
    arguments, named = case.get("args") or [], case.get("kwargs") or {}
    if not isinstance(arguments, Sequence) or isinstance(arguments, str):
        raise UnreadableValue(f"column {column!r}: args is no list")
    if not isinstance(named, Mapping):
        raise UnreadableValue(f"column {column!r}: kwargs is no table")
    tolerance = case.get("tolerance") or 0.0
    if type(tolerance) not in (int, float) or not 0 <= tolerance < math.inf:
        raise UnreadableValue(f"column {column!r}: tolerance {tolerance!r} is no number from 0 on")
    plain = {"call": call, "args": [*arguments], "kwargs": {**named}, "expected": case["expected"]}
    try:
        return json.loads(json.dumps({**plain, **({"tolerance": tolerance} if tolerance else {})}))
    except (TypeError, ValueError, RecursionError) as error:
        raise UnreadableValue(f"column {column!r}: a test is not JSON: {error}") from None


def _functional(
    column: str, given: str, expected: str, values: Mapping[str, Any], config: CodeConfig
) -> dict[str, Any]:
    """Return a call of LiveCodeBench: an argument in each line, and the value, as JSON."""
    name = _entry_point(values, config)
    if name is None:
        raise MissingValue(f"column {column!r} has functional tests, and no func_name in metadata")
    in_class = "class Solution" in str(values.get("starter_code") or "")
    try:
        arguments = [json.loads(line) for line in given.split("\n") if line.strip()]
        value = json.loads(expected)
    except ValueError:
        raise UnreadableValue(f"column {column!r}: a functional test is no JSON") from None
    return {"call": f"Solution.{name}" if in_class else name, "args": arguments, "expected": value}


def _joined(value: Any) -> str:
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)


def _entry_point(values: Mapping[str, Any], config: CodeConfig) -> str | None:
    """Return the name of the function that tests call, from a column, the recipe, or LiveCodeBench."""
    named = config.entry_point
    if named is not None and named not in values and named.isidentifier():
        return named
    name = column_value(values, named) if named else values.get("entry_point")
    metadata = _unpacked(values.get("metadata"))
    if not name and isinstance(metadata, Mapping):
        name = metadata.get("func_name")
    return str(name) if name else None


def _setup(values: Mapping[str, Any], config: CodeConfig) -> str:
    if config.setup is not None:
        return _text(values, config.setup)
    return "\n".join(_text(values, name) for name in ("test_imports", "test_setup_code")).strip()


def _text(values: Mapping[str, Any], column: str | None) -> str:
    """Return a column's text, or its lines; empty if the row has no such column."""
    if column is None or column not in values:
        return ""
    value = values[column]
    return "\n".join(map(str, value)) if isinstance(value, list | tuple) else str(value or "")


def _python(code: str, column: str) -> str:
    try:
        ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise UnreadableValue(f"column {column!r} is no Python: {error}") from None
    return code


def _unpacked(value: Any) -> Any:
    """Return a value, of a text with JSON what it holds, also if packed as LiveCodeBench packs it."""
    if not isinstance(value, str):
        return value.tolist() if hasattr(value, "tolist") else value
    text = value.strip()
    if text[:1] not in ("[", "{") and len(text) > 40 and text[:2] == "eJ":
        text = _inflated(text)
    if text[:1] in ("[", "{"):
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            return value
    return value


class _TextUnpickler(pickle.Unpickler):
    """Unpickles a text, and refuses every class and function."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        """Refuse a name that the pickle wants to import."""
        raise pickle.UnpicklingError(f"the pickle names {module_name}.{global_name}")


def _inflated(text: str) -> str:
    """Return the JSON in base64 of zlib of a pickled text. Raises `UnreadableValue`."""
    try:
        inflater = zlib.decompressobj()
        data = inflater.decompress(base64.b64decode(text, validate=True), MAX_UNPACKED_BYTES)
        if inflater.unconsumed_tail:
            raise UnreadableValue(f"packed tests of more than {MAX_UNPACKED_BYTES >> 20} MiB")
        value = _TextUnpickler(io.BytesIO(data)).load()
        return value if isinstance(value, str) else json.dumps(value)
    except UnreadableValue:
        raise
    except Exception as error:  # the data are another's: a pickle can fail in any way
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UnreadableValue(f"packed tests cannot be read: {reason}") from None
