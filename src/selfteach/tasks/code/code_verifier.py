"""Verifies code by running unit tests on it, in isolated processes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from selfteach.config.code_section import CodeConfig
from selfteach.errors import DataError
from selfteach.tasks.code.answer_code import AnswerCode, find_code
from selfteach.tasks.code.code_pool import CodePool, Outcome
from selfteach.tasks.code.code_tests import KEY, Tests, entry_names
from selfteach.tasks.code.outcomes import evidence_of, feedback_of
from selfteach.types import Problem, Verdict

NO_CODE = "There is no code in the answer."
WRONG_BODIES = (
    "    return None\n",
    "    raise StopIteration\n",
    "    emptied = [one for one in (*arguments, *named.values()) if hasattr(one, 'clear')]\n"
    "    for one in emptied:\n"
    "        one.clear()\n"
    "    return type(emptied[0])()\n",
)
"""Bodies of functions that are right for no problem, but for one that asks to empty its argument."""
DESCRIPTIONS = {
    "bubblewrap": "bubblewrap, Landlock where there is, and a filter of system calls",
    "namespaces": "namespaces of their own, Landlock where there is, and a filter of system calls",
    "landlock": "Landlock and a filter of system calls",
    "rlimits": "limits of resources alone: they run with the rights of this user",
}


class CodeVerifier:
    """Accepts an answer whose code passes all tests of its problem.

    The tests are those of `code_tests`, in the problem's ``meta``. Raises `DataError`, in one line, if
    answers cannot be isolated as the recipe demands.
    """

    def __init__(self, config: CodeConfig | None = None, pool: CodePool | None = None) -> None:
        self.process = pool or CodePool(config or CodeConfig())

    @property
    def description(self) -> str:
        """Return in one line how answers are isolated."""
        pool = self.process
        how = DESCRIPTIONS[pool.isolation]
        return f"code: answers are isolated by {how}; {pool.workers} at a time"

    def __call__(self, problem: Problem, text: str) -> Verdict:
        """Return the verdict on an answer's text. Raises `DataError` for a problem without tests."""
        return self.verify_all([(problem, text)])[0]

    def verify_all(self, answers: Sequence[tuple[Problem, str]]) -> list[Verdict]:
        """Return the verdicts on many answers, run side by side, in order."""
        requests: list[tuple[Tests, str]] = []
        codes: list[AnswerCode | None] = []
        for problem, text in answers:
            codes.append(code := self.code_of(problem, text))
            if code is not None:
                requests.append((tests_of(problem), code.code))
        outcomes = iter(self.process.run_all(requests))
        pairs = zip(answers, codes, strict=True)
        return [self._verdict(problem, code, outcomes) for (problem, _), code in pairs]

    def code_of(self, problem: Problem, text: str) -> AnswerCode | None:
        """Return the code that is tested. Raises `DataError` for a problem without tests."""
        return find_code(text, entry_names(tests_of(problem)))

    def _verdict(
        self, problem: Problem, code: AnswerCode | None, outcomes: Iterator[Outcome]
    ) -> Verdict:
        if code is None:
            return Verdict(False, False, None, NO_CODE, evidence={"kind": "no_code"})
        outcome = next(outcomes)
        correct = outcome["kind"] == "passed"
        return Verdict(
            correct,
            True,
            (problem.answer if correct else None) or code.code.strip(),
            feedback_of(outcome, code, self.process.config.cpu_s),
            timed_out=outcome["kind"] in ("timeout", "broken"),
            evidence=evidence_of(outcome, code),
        )


def tests_of(problem: Problem) -> Tests:
    """Return the tests of a problem. Raises `DataError` for one without."""
    tests = problem.meta.get(KEY)
    if not isinstance(tests, dict):
        raise DataError(
            f'data.verifier = "code": problem {problem.label!r} has no tests; its meta has no {KEY!r}'
        )
    return tests


def wrong_code(problem: Problem) -> Iterator[str]:
    """Yield code that no tests should accept, or no program.

    The functions return nothing; raise what ends a test's loop; or empty their arguments, so that a
    test that computes what is expected from these afterwards expects nothing.
    """
    tests = problem.meta.get(KEY)
    names = entry_names(tests) if isinstance(tests, dict) else []
    names = names or re.findall(r"^def (\w+)", problem.answer, re.MULTILINE)
    for body in WRONG_BODIES if names else ():
        yield "\n".join(f"def {name}(*arguments, **named):\n{body}" for name in names)
    if not names:
        yield "pass\n"
