"""The calculator, Python in a sandbox, and what tools reply to calls that are none."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfteach.config.code_section import CodeConfig
from selfteach.episodes import EnvironmentReply, ToolCall, Turn
from selfteach.protocols import Environment
from selfteach.tasks.environments.calculator import CalculatorEnvironment, compute, written
from selfteach.tasks.environments.python_tool import PythonEnvironment, PythonRunner
from selfteach.tasks.environments.tool_environment import MAX_CALLS, ToolError


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("6 * 7", "42"),
        ("(12 + 30) / 4", "10.5"),
        ("1 / 3", "0.3333333333"),
        ("0.1 + 0.2", "0.3"),
        ("-2 ** 2", "-4"),
        ("2^10", "1024"),
        ("1,234 × 2 − 8 ÷ 4", "2466"),
        ("7 // 2 + 7 % 4", "6"),
        ("2 ** -1", "0.5"),
        ("-1 / 3", "-0.3333333333"),
    ],
)
def test_the_calculator_computes_exactly(expression: str, value: str) -> None:
    assert written(compute(expression)) == value


@pytest.mark.parametrize(
    ("expression", "why"),
    [
        ("", "no arithmetic expression"),
        ("6 *", "no arithmetic expression"),
        ("__import__('os').system('true')", "no arithmetic expression"),
        ("(1).__class__", "no arithmetic expression"),
        ("True + 1", "no arithmetic expression"),
        ("x = 3", "no arithmetic expression"),
        ("1 / (2 - 2)", "division by zero"),
        ("9 ** 9 ** 9", "too large"),
        ("2 ** 0.5", "only integers"),
        ("1" + " + 1" * 200, "at most 500"),
        ("(" * 240 + "1" + ")" * 240, "no arithmetic expression"),
        ("9 ** 300", "too large to be shown"),
    ],
)
def test_what_the_calculator_refuses_is_a_message(expression: str, why: str) -> None:
    reply = CalculatorEnvironment().step(
        Turn("", (ToolCall("calculator", {"expression": expression}),))
    )
    assert reply.event == "tool_error" and why in reply.texts[0] and not reply.done


@given(st.text(alphabet="0123456789+-*/%().^, e", max_size=40))
def test_no_expression_raises_anything_else(expression: str) -> None:
    try:
        written(compute(expression))
    except ToolError as error:
        assert str(error)


@pytest.mark.parametrize(
    ("turn", "event", "texts"),
    [
        (Turn("4"), "tool_result", ()),
        (Turn("", malformed="no JSON"), "malformed_call", ("Error: no JSON",)),
        (
            Turn("", (ToolCall("abacus"),)), "tool_error",
            ("Error: no tool 'abacus'; there is calculator",),
        ),
        (
            Turn("", (ToolCall("calculator"),)), "tool_error",
            ("Error: calculator: the argument 'expression' is missing",),
        ),
        (
            Turn("", (ToolCall("calculator", {"expression": 3}),)), "tool_error",
            ("Error: calculator: 'expression' must be of type string",),
        ),
        (
            Turn("", (ToolCall("calculator", {"expression": "1", "x": 3}),)), "tool_error",
            ("Error: calculator: no argument 'x'; expression",),
        ),
        (
            Turn("", (ToolCall("calculator", {"expression": "1+1"}),) * 2), "tool_result", ("2", "2"),
        ),
        (
            Turn("", (ToolCall("calculator", {"expression": "1+1"}), ToolCall("b"))), "tool_error",
            ("2", "Error: no tool 'b'; there is calculator"),
        ),
    ],
)  # fmt: skip
def test_each_call_gets_a_reply(turn: Turn, event: str, texts: tuple[str, ...]) -> None:
    environment = CalculatorEnvironment()
    assert isinstance(environment, Environment) and environment.verdict() is None
    assert environment.step(turn) == EnvironmentReply(texts, event, not texts)  # type: ignore[arg-type]


def test_many_calls_of_one_turn_are_bounded() -> None:
    call = ToolCall("calculator", {"expression": "1"})
    reply = CalculatorEnvironment().step(Turn("", (call,) * 100))
    assert len(reply.texts) == MAX_CALLS + 1 and reply.event == "tool_error"


@pytest.fixture(scope="module")
def runner() -> PythonRunner:
    return PythonRunner(CodeConfig(cpu_s=1.0, workers=1))


@pytest.mark.parametrize(
    ("code", "event", "text"),
    [
        ("print(6 * 7)", "tool_result", "42"),
        ("x = 1", "tool_result", "(the program printed nothing)"),
        ("print(1)\nraise ValueError('no')", "tool_error", "Error: ValueError: no (line 2)\n1"),
        ("print(", "tool_error", "Error: SyntaxError"),
        ("import socket", "tool_error", "'socket' is not available"),
        ("open('/etc/passwd')", "tool_error", "Error: "),
        ("import os; os._exit(3)", "tool_error", "ended early"),
        ("while True: pass", "tool_error", "did not end within 1 s"),
    ],
)
def test_python_runs_in_the_sandbox(runner: PythonRunner, code: str, event: str, text: str) -> None:
    reply = PythonEnvironment(runner).step(Turn("", (ToolCall("python", {"code": code}),)))
    assert reply.event == event and text in reply.texts[0], reply
