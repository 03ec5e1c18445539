"""What a notebook imports: each name is also public where it is defined."""

from __future__ import annotations

from selfteach.commands.evaluate import evaluate_model, summary
from selfteach.commands.inspect.inspection import Request, inspect_model

__all__ = ["Request", "evaluate_model", "inspect_model", "summary"]
