"""The common part of environments that offer tools: calls are checked, called and reported."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from selfteach.episodes import EnvironmentReply, ToolCall, Turn
from selfteach.types import Problem, Verdict

MAX_CALLS = 16
"""Calls of one turn that are answered."""
NAMES: Mapping[str, type | tuple[type, ...]] = {
    "string": str, "integer": int, "number": (int, float), "boolean": bool, "array": list,
    "object": dict,
}  # fmt: skip
"""Python's type of each type of a JSON schema."""


class ToolError(Exception):
    """Raised by a tool that has no result; the message is what the policy reads."""


def function_tool(name: str, description: str, **arguments: str) -> dict[str, Any]:
    """Return a tool whose arguments are all required strings, with their descriptions."""
    properties = {key: {"type": "string", "description": text} for key, text in arguments.items()}
    parameters = {"type": "object", "properties": properties, "required": list(arguments)}
    function = {"name": name, "description": description, "parameters": parameters}
    return {"type": "function", "function": function}


class ToolEnvironment(ABC):
    """Implements `Environment` for tools: subclass it, with ``tools`` and `call`.

    A turn without a call ends the episode: it is the answer, which the task's verifier reads. A call
    that cannot be read, or that raises `ToolError`, gets its reason as a reply; the episode goes on.
    """

    tools: Sequence[Mapping[str, Any]] = ()

    @abstractmethod
    def call(self, name: str, arguments: Mapping[str, Any]) -> str:
        """Return a tool's result. Raises `ToolError` if there is none."""

    def reset(self, problem: Problem, seed: int) -> str:
        """Begin an episode; nothing is shown behind the question."""
        return ""

    def step(self, turn: Turn) -> EnvironmentReply:
        """Call the turn's tools, in order; end the episode if it has none."""
        if turn.malformed is not None:
            return EnvironmentReply((f"Error: {turn.malformed}",), "malformed_call")
        if not turn.calls:
            return EnvironmentReply((), done=True)
        results = [self._result(call) for call in turn.calls[:MAX_CALLS]]
        if len(turn.calls) > MAX_CALLS:
            text = f"Error: {len(turn.calls)} calls in one turn; only {MAX_CALLS} were made"
            results.append((text, False))
        texts = tuple(text for text, _ in results)
        return EnvironmentReply(
            texts, "tool_result" if all(ok for _, ok in results) else "tool_error"
        )

    def verdict(self) -> Verdict | None:
        """Return None: the task's verifier reads the last turn."""
        return None

    def _result(self, call: ToolCall) -> tuple[str, bool]:
        """Return what a call's reply says, and whether it is a result."""
        try:
            self._require_arguments(call)
            return self.call(call.name, call.arguments), True
        except ToolError as error:
            return f"Error: {error}", False

    def _require_arguments(self, call: ToolCall) -> None:
        """Raise `ToolError` for a tool that does not exist, or arguments that it does not take."""
        functions = {tool["function"]["name"]: tool["function"] for tool in self.tools}
        if call.name not in functions:
            raise ToolError(f"no tool {call.name!r}; there is {', '.join(functions)}")
        schema = functions[call.name].get("parameters", {})
        properties = schema.get("properties", {})
        for name in schema.get("required", ()):
            if name not in call.arguments:
                raise ToolError(f"{call.name}: the argument {name!r} is missing")
        for name, value in call.arguments.items():
            if name not in properties:
                raise ToolError(f"{call.name}: no argument {name!r}; {', '.join(properties)}")
            kind = properties[name].get("type")
            if kind in NAMES and not _is(value, kind):
                raise ToolError(f"{call.name}: {name!r} must be of type {kind}")


def _is(value: object, kind: str) -> bool:
    is_truth = isinstance(value, bool)
    return isinstance(value, NAMES[kind]) and (kind == "boolean" or not is_truth)
