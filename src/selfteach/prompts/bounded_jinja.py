"""Runs templates in Jinja's sandbox: a folder of templates comes from others and must not run code."""

from __future__ import annotations

from typing import Any

from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_CHARS = 10_000_000
"""Longest text or list that a template may make by multiplication."""
MAX_EXPONENT = 64
"""Largest exponent in a template."""


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """Renders templates that reach no private attribute; bounds products and powers."""

    intercepted_binops = frozenset(["*", "**"])

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Compute a product or a power. Raises `SecurityError` if the result would fill the memory."""
        if operator == "**" and abs(right) > MAX_EXPONENT:
            raise SecurityError(f"an exponent of {right}: at most {MAX_EXPONENT}")
        for text, times in ((left, right), (right, left)):
            repeated = isinstance(text, str | list | tuple) and isinstance(times, int)
            if repeated and len(text) * times > MAX_CHARS:
                raise SecurityError(f"a text of {len(text) * times} characters")
        return super().call_binop(context, operator, left, right)
