"""A calculator: arithmetic with exact fractions, and nothing else."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

from selfteach.tasks.environments.tool_environment import (
    ToolEnvironment,
    ToolError,
    function_tool,
)

TOOL = function_tool(
    "calculator",
    "Computes an arithmetic expression with + - * / // % ** and parentheses.",
    expression="The expression, like (12 + 30) * 2",
)
MAX_CHARS = 500
"""Characters of an expression."""
MAX_BITS = 10_000
"""Bits of a number that is computed."""
MAX_DIGITS = 200
"""Digits of a result that is shown."""
DECIMALS = 10
"""Decimals of a result that is no integer."""
SPELLINGS = str.maketrans({"×": "*", "·": "*", "÷": "/", "−": "-", "–": "-", "^": "**", ",": ""})
CHARACTERS = re.compile(r"[0-9eE+\-*/%(). \t]+")
"""Matches what an expression consists of, so that no other code is parsed."""
OPERATIONS: Mapping[type, Callable[[Fraction, Fraction], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod,
}  # fmt: skip


class CalculatorEnvironment(ToolEnvironment):
    """Offers a calculator."""

    tools = (TOOL,)

    def call(self, name: str, arguments: Mapping[str, Any]) -> str:
        """Compute an expression. Raises `ToolError` for one that is none, or too large."""
        return written(compute(str(arguments["expression"])))


def compute(expression: str) -> Fraction:
    """Return an expression's exact value. Raises `ToolError` for one that is none, or too large."""
    if len(expression) > MAX_CHARS:
        raise ToolError(f"an expression of {len(expression)} characters: at most {MAX_CHARS}")
    try:
        text = expression.translate(SPELLINGS).strip()
        if not CHARACTERS.fullmatch(text):
            raise ValueError
        return _value(ast.parse(text, mode="eval").body)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ToolError(f"{expression!r} is no arithmetic expression") from None
    except ZeroDivisionError:
        raise ToolError("division by zero") from None


def written(value: Fraction) -> str:
    """Return a value as a calculator shows it: an integer, or a decimal number, rounded."""
    if value.denominator == 1:
        if abs(value.numerator).bit_length() > MAX_DIGITS * 3:
            raise ToolError("the result is too large to be shown")
        return str(value.numerator)
    if abs(value) >= 10**MAX_DIGITS:
        raise ToolError("the result is too large to be shown")
    scaled = round(abs(value) * 10**DECIMALS)
    whole, rest = divmod(scaled, 10**DECIMALS)
    decimals = f"{rest:0{DECIMALS}d}".rstrip("0")
    sign = "-" if value < 0 and scaled else ""
    return f"{sign}{whole}.{decimals}" if decimals else f"{sign}{whole}"


def _value(node: ast.expr) -> Fraction:
    match node:
        case ast.Constant(value=bool()):
            raise ValueError
        case ast.Constant(value=int() | float() as number):
            return Fraction(str(number))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand)
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            return _value(operand)
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            return _power(_value(left), _value(right))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATIONS:
            return _bounded(Fraction(OPERATIONS[type(op)](_value(left), _value(right))))
        case _:
            raise ValueError


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1:
        raise ToolError("only integers can be exponents")
    if _bits(base) * abs(exponent.numerator) > MAX_BITS:
        raise ToolError("the result is too large")
    return base**exponent.numerator


def _bounded(value: Fraction) -> Fraction:
    if _bits(value) > MAX_BITS:
        raise ToolError("the result is too large")
    return value


def _bits(value: Fraction) -> int:
    return max(value.numerator.bit_length(), value.denominator.bit_length())
