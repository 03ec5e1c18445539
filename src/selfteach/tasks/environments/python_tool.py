"""Python as a tool: each call is a program in an isolated process, as answers are verified."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

from selfteach.config.code_section import CodeConfig
from selfteach.tasks.code.code_pool import CodePool
from selfteach.tasks.environments.tool_environment import (
    ToolEnvironment,
    ToolError,
    function_tool,
)

TOOL = function_tool(
    "python",
    "Runs a Python program and returns what it prints. Programs share nothing: each begins anew.",
    code="The program; print what you want to see",
)
PROGRAM: Mapping[str, Any] = {"shape": "output", "stdin": ""}
"""What is run in place of an answer's tests."""


class PythonRunner:
    """Runs programs in the isolated processes of one pool, which is started when it is first needed."""

    def __init__(self, config: CodeConfig) -> None:
        self._config, self._lock = config, threading.Lock()
        self._pool: CodePool | None = None

    def start(self) -> CodePool:
        """Return the pool. Raises `DataError` if programs cannot be isolated as the recipe demands."""
        with self._lock:
            if self._pool is None:
                self._pool = CodePool(self._config)
            return self._pool

    def run(self, code: str) -> str:
        """Return what a program prints. Raises `ToolError` if it fails, with what it has printed."""
        outcome = self.start().run(PROGRAM, code)
        printed = str(outcome.get("output") or "").rstrip("\n")
        if outcome["kind"] == "passed":
            return printed or "(the program printed nothing)"
        reason = self._reason(outcome)
        raise ToolError(f"{reason}\n{printed}" if printed else reason)

    def _reason(self, outcome: Mapping[str, Any]) -> str:
        kind, error = outcome["kind"], outcome.get("error") or ""
        line = f" (line {outcome['line']})" if outcome.get("line") else ""
        match kind:
            case "timeout":
                return f"the program did not end within {self._config.cpu_s:g} s"
            case "memory":
                return "the program used too much memory"
            case "import_refused":
                return f"{outcome.get('detail')!r} is not available: use the standard library"
            case "exception" | "syntax":
                return f"{error}{line}"
            case _:
                return f"the program ended early: {error or outcome.get('detail') or kind}"


class PythonEnvironment(ToolEnvironment):
    """Offers Python."""

    tools = (TOOL,)

    def __init__(self, runner: PythonRunner) -> None:
        self._runner = runner

    def call(self, name: str, arguments: Mapping[str, Any]) -> str:
        """Run a program. Raises `ToolError` if it fails."""
        return self._runner.run(str(arguments["code"]))
