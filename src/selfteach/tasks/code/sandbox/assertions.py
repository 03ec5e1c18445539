"""Runs test code that was written for the answer's own process: the answer's names become calls there.

Comparisons are made here, on plain data. ``assert`` statements are rewritten so that a failure tells
what was expected and what came instead.
"""

from __future__ import annotations

import ast
import builtins
import copy
import operator
import sys
from collections.abc import Callable
from typing import Any

from .guest_process import CheckFailed, GuestProcess, named
from .values import MUTABLE, shown

COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le,
    ast.Gt: operator.gt, ast.GtE: operator.ge, ast.Is: operator.is_, ast.IsNot: operator.is_not,
}  # fmt: skip
SIGNS = {
    "Eq": "", "NotEq": "other than ", "Lt": "less than ", "LtE": "at most ", "Gt": "more than ",
    "GtE": "at least ", "Is": "", "IsNot": "other than ",
}  # fmt: skip


class CheckedAsserts(ast.NodeTransformer):
    """Rewrites ``assert a == b`` to a call of `Checks.compare`, other asserts to `Checks.holds`."""

    def __init__(self, names: set[str]) -> None:
        self._names = names
        self.of_values = 0
        """Asserts of something else than a constant; ``assert False`` says what must not be reached."""

    def visit_Assert(self, node: ast.Assert) -> ast.AST:
        """Return the statement that takes the place of an assert."""
        test, source = node.test, ast.Constant(ast.unparse(node.test)[:400])
        arguments: list[ast.expr] = [test, source, ast.Constant(not isinstance(test, ast.Constant))]
        self.of_values += not isinstance(test, ast.Constant)
        method = "holds"
        if isinstance(test, ast.Compare) and len(test.ops) == 1 and type(test.ops[0]) in COMPARE:
            left, right = test.left, test.comparators[0]
            is_left = self._calls(left) or not self._calls(right)
            sign = ast.Constant(type(test.ops[0]).__name__)
            arguments = [left, sign, right, source, ast.Constant(is_left)]
            method = "compare"
            # What is expected comes first, and as a copy: the call may change its arguments.
            if self._calls(left) and not self._calls(right):
                arguments = [_expected(right, test.ops[0]), left, sign, source]
                method = "compare_with"
            elif self._calls(right) and not self._calls(left):
                arguments[0] = _expected(left, test.ops[0])
        function = ast.Attribute(ast.Name("__checks__", ast.Load()), method, ast.Load())
        call = ast.Expr(ast.Call(function, arguments, []))
        return ast.fix_missing_locations(ast.copy_location(call, node))

    def _calls(self, node: ast.AST) -> bool:
        return any(isinstance(n, ast.Name) and n.id in self._names for n in ast.walk(node))


def _expected(node: ast.expr, operation: ast.cmpop) -> ast.expr:
    if isinstance(operation, ast.Is | ast.IsNot):
        return node
    copied = ast.Attribute(ast.Name("__checks__", ast.Load()), "copied", ast.Load())
    return ast.Call(copied, [node], [])


class Checks:
    """Makes the comparisons of rewritten asserts, and counts those that hold."""

    def __init__(self) -> None:
        self.passed = 0
        self.of_values = 0
        """Asserts that hold of something else than a constant."""
        self.source = ""
        """The test that is being checked, as it was written."""

    def compare(self, left: Any, sign: str, right: Any, source: str, is_left: bool) -> None:
        """Raise `CheckFailed` unless the comparison holds."""
        self.source = source
        if not COMPARE[getattr(ast, sign)](left, right):
            expected, got = (right, left) if is_left else (left, right)
            raise CheckFailed(SIGNS[sign] + shown(expected), shown(got))
        self.passed += 1
        self.of_values += 1

    def compare_with(self, expected: Any, got: Any, sign: str, source: str) -> None:
        """Raise `CheckFailed` unless a value compares so with one that was computed before it."""
        self.compare(got, sign, expected, source, True)

    @staticmethod
    def copied(value: Any) -> Any:
        """Return a copy of a plain value."""
        return copy.deepcopy(value) if isinstance(value, MUTABLE) else value

    def holds(self, value: Any, source: str, of_value: bool) -> None:
        """Raise `CheckFailed` unless a value is true."""
        self.source = source
        if not value:
            raise CheckFailed("a true value", shown(value))
        self.passed += 1
        self.of_values += of_value


def free_names(tree: ast.AST) -> set[str]:
    """Return the names that test code reads and does not define."""
    read, defined = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            (read if isinstance(node.ctx, ast.Load) else defined).add(node.id)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            defined.add(node.name)
        elif isinstance(node, ast.arg):
            defined.add(node.arg)
        elif isinstance(node, ast.alias):
            defined.add((node.asname or node.name).partition(".")[0])
        elif isinstance(node, ast.ExceptHandler) and node.name:
            defined.add(node.name)
    return read - defined


def called_names(tree: ast.AST) -> list[str]:
    """Return the names of functions that asserts call, the outermost of each first."""
    return [
        node.func.id
        for statement in ast.walk(tree)
        if isinstance(statement, ast.Assert)
        for node in ast.walk(statement)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    ]


def called(trees: list[ast.Module], entry_point: str | None) -> set[str]:
    """Return the names that tests call, or hand to ``check``."""
    calls = (n for tree in trees for n in ast.walk(tree) if isinstance(n, ast.Call))
    names = {call.func.id for call in calls if isinstance(call.func, ast.Name)}
    return names | ({entry_point} if entry_point else set())


def answer_names(tests: list[ast.Module], setup: ast.Module, entry_point: str | None) -> list[str]:
    """Return the names that tests take from the answer: the entry point, and what nothing defines.

    A built-in name (some problems ask for a function ``sum``) is the answer's only where tests call
    nothing else; so an answer cannot replace the ``abs`` or ``set`` of a test.
    """
    defined = {name for node in ast.walk(setup) for name in _defined_by(node)}
    # A name that is called is no module: a function may be called ``copy`` or ``calendar``.
    modules = {*sys.stdlib_module_names} - called(tests, None)
    defined |= {*dir(builtins), *modules}
    names = dict.fromkeys([entry_point] if entry_point else [])
    for tree in [setup, *tests]:
        names |= dict.fromkeys(sorted(free_names(tree) - defined))
    if not names:
        names |= dict.fromkeys(name for tree in tests for name in called_names(tree)[:1])
    return list(names)


def _defined_by(node: ast.AST) -> list[str]:
    match node:
        case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
            return [name]
        case ast.alias(name=name, asname=alias):
            return [(alias or name).partition(".")[0]]
        case ast.Name(id=name, ctx=ast.Store()):
            return [name]
    return []


def namespace(
    guest: GuestProcess, names: list[str], setup: ast.Module, checks: Checks
) -> dict[str, Any]:
    """Return the globals of test code: what the set-up defines, and the answer's names."""
    answers = {name: named(guest.request("get", name), name) for name in names}
    space: dict[str, Any] = {"__name__": "tests", "__checks__": checks, **answers}
    with_modules(space, [setup])
    exec(compile(setup, "<setup>", "exec", dont_inherit=True), space)
    space.update(answers)  # a stub of the entry point in the set-up is not the answer
    return space


def with_modules(space: dict[str, Any], trees: list[ast.Module]) -> None:
    """Import standard modules that tests use without importing them; never the answer's."""
    for tree in trees:
        for name in free_names(tree):
            if name in sys.stdlib_module_names and name not in space:
                space[name] = __import__(name)
