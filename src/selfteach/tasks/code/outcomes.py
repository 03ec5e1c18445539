"""Describes how an answer's tests ended: the environment's message, and evidence for critics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from selfteach.tasks.code.answer_code import AnswerCode

OutcomeKind = Literal[
    "passed", "failed", "exception", "timeout", "memory", "import_refused", "syntax", "exit", "output",
    "missing", "tests", "broken",
]  # fmt: skip
"""How the tests of an answer ended. ``exit``: the process ended before the tests did; ``output``: it
wrote too much; ``missing``: the code does not define what the tests call; ``tests``: the tests
themselves cannot be run, or check nothing with this answer; ``broken``: the runner failed, which is
no fault of the answer."""
EVIDENCE = (
    "kind", "test", "call", "expected", "got", "error", "line", "entry_line", "passed", "total",
)  # fmt: skip


def evidence_of(outcome: Mapping[str, Any], answer: AnswerCode) -> dict[str, Any]:
    """Return what a critic may rely on: the test, the call, the values, and the line with its place.

    ``line`` counts from 1 in the code; ``span`` is that line in the answer's text, in characters.
    """
    evidence = {name: outcome[name] for name in EVIDENCE if outcome.get(name) is not None}
    line = evidence.get("line")
    span = answer.line_span(line) if isinstance(line, int) else None
    if span is None:
        evidence.pop("line", None)
        return evidence
    return {**evidence, "source": answer.source_line(evidence["line"]), "span": list(span)}


def feedback_of(outcome: Mapping[str, Any], answer: AnswerCode, cpu_s: float) -> str | None:
    """Return the environment's message about an outcome; None if all tests are passed."""
    if outcome["kind"] == "passed":
        return None
    lines = [_summary(outcome, cpu_s)]
    line = outcome.get("line")
    if isinstance(line, int) and (source := answer.source_line(line)):
        lines.append(f"Line {line} of the code: {source}")
    call, test = outcome.get("call"), outcome.get("test")
    if outcome["kind"] not in ("syntax", "import_refused", "missing", "tests", "broken"):
        if test and not (call and test.startswith("stdin")):
            lines.append(f"Test: {test}")
        if call and call not in (test or ""):
            lines.append(f"Call: {call}")
        if outcome["kind"] == "failed":
            lines += [f"Expected: {outcome['expected']}", f"Got: {outcome['got']}"]
        if outcome.get("passed"):
            total = f" of {outcome['total']}" if outcome.get("total") else ""
            lines.append(f"Tests passed before this one: {outcome['passed']}{total}")
    return "\n".join(lines)


def _summary(outcome: Mapping[str, Any], cpu_s: float) -> str:
    detail, error = outcome.get("detail"), outcome.get("error")
    match outcome["kind"]:
        case "failed":
            return "A test failed: the value is wrong."
        case "exception":
            return f"The code raised an exception: {error}"
        case "timeout":
            return f"The code did not end within {cpu_s:g} seconds."
        case "memory":
            return "The code used too much memory."
        case "import_refused":
            return f"The code imports {detail!r}, which is not available: use the standard library."
        case "syntax":
            return f"The code is not valid Python: {error}"
        case "exit":
            return f"The program ended before the tests did ({detail})."
        case "output":
            return f"The code produced too much: {detail}."
        case "missing":
            return f"The code does not define {detail}."
        case "tests":
            return f"The tests could not be run: {detail}"
        case _:
            return "The code could not be run."
