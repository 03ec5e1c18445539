"""Verifiers of final answers given as text."""

from __future__ import annotations

import re

from selfteach.errors import DataError
from selfteach.protocols import Verifier
from selfteach.types import Problem, Verdict

ANSWER = re.compile(r"<answer>(.*?)(?:</answer>|$)", re.DOTALL)


def final_answer(text: str) -> str | None:
    """What stands in the last ``<answer>`` tag, or None."""
    found = ANSWER.findall(text)
    return found[-1].strip() or None if found else None


def exact(problem: Problem, text: str) -> Verdict:
    """Right if the tagged answer is the problem's, white space apart."""
    parsed = final_answer(text)
    parsed = " ".join(parsed.split()) if parsed is not None else None
    return Verdict.of_final(parsed == " ".join(problem.answer.split()), parsed)


def math() -> Verifier:
    """Right if the tagged answer equals the problem's as mathematics (math-verify).

    Raises `DataError` if math-verify is not installed.
    """
    try:
        from math_verify import parse, verify
    except ImportError:
        raise DataError(
            'data.verifier = "math" needs math-verify: pip install "selfteach[math]"'
        ) from None

    def judge(problem: Problem, text: str) -> Verdict:
        tagged = final_answer(text)
        if tagged is None:
            return Verdict.of_final(False, None)
        found = parse(f"${tagged}$")
        correct = bool(verify(parse(f"${problem.answer}$"), found))
        # The canonical form makes equal answers vote together, however they are written.
        canonical = problem.answer if correct else str(found[0]) if found else tagged
        return Verdict.of_final(correct, canonical)

    return judge
