"""Critiques code by running it: finds the first wrong line, and completes the lines before it.

A *completion* of an answer's first k lines is these lines and the rest of a worked solution. The lines
are right if their completion passes all tests; the first wrong line follows the most lines that are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any, Literal

import numpy as np

from selfteach.tasks.code.answer_parts import AnswerParts, lines_of, parts_of, steps_of_code
from selfteach.tasks.code.code_mutations import mutants
from selfteach.tasks.code.code_pool import Outcome
from selfteach.tasks.code.code_steps import code_steps, is_remark, statement_lines
from selfteach.tasks.code.code_tests import Tests
from selfteach.tasks.code.code_verifier import CodeVerifier, tests_of
from selfteach.tasks.code.program_alignment import Alignment, align
from selfteach.types import Case, Critique, CritiqueFailure, CritiqueStep, Problem, StepStatus

SOLUTIONS = "solutions"
"""The key of a problem's ``meta`` that holds its worked solutions, a list of programs."""
MIN_SIMILARITY = 0.5
"""A worked solution is near an answer whose similarity (`Alignment`) is at least this."""
MAX_STEPS, MAX_CHARACTERS = 80, 20_000
"""Size of programs that are aligned."""
MAX_EVENTS = 2_000
"""Executed lines that are compared."""
NoOracle = Literal["no_code", "no_solution", "other_way", "no_trace", "ambiguous"]
"""Why a wrong answer has no first wrong line: it has no code; the problem has no worked solution that
passes its tests; none is near; the answer's lines cannot be traced on the test that it fails; or the
trace departs at another line than the one that no completion contains."""


@dataclass(frozen=True, slots=True)
class Repair:
    """Holds an answer's program, completed after its right lines."""

    answer: tuple[str, ...]
    program: tuple[str, ...]
    right: int
    """Number of the answer's leading steps that are right, and the program's too."""


class CodeOracle:
    """Critiques answers with worked solutions, which it runs in the verifier's isolated processes.

    The solutions are those of the problem's ``meta["solutions"]``, its answer, and no other.
    """

    def __init__(self, verify: CodeVerifier) -> None:
        self._verify = verify

    def __call__(
        self,
        problem: Problem,
        text: str,
        *,
        finished: bool,
        error_rate: float = 0.0,
        rng: np.random.Generator | None = None,
    ) -> Critique | CritiqueFailure:
        """Return the answer with its first wrong line corrected and a worked solution's rest.

        Of a critic that errs (with probability ``error_rate``) the program has an error.
        """
        code = self._verify.code_of(problem, text)
        parts = parts_of(text, code, code_steps)
        if not parts.code:
            return _failure("no_code", "there is no code in the answer")
        outcome = self._run(problem, parts.code)
        is_right = outcome["kind"] == "passed"
        repair: Repair | CritiqueFailure = Repair(parts.code, parts.code, len(parts.code))
        if not is_right:
            repair = self._repair(problem, parts.code)
            if isinstance(repair, Repair) and (finished or not _is_cut(repair)):
                repair = self._confirmed(problem, repair, outcome)
        if isinstance(repair, CritiqueFailure):
            return repair
        written = repair.program
        if error_rate > 0 and rng is not None and rng.random() < error_rate:
            written = self._with_error(problem, repair, rng)
        return _critique(problem, parts, repair, written, finished=finished, is_right=is_right)

    def _run(self, problem: Problem, steps: Sequence[str]) -> Outcome:
        return self._verify.process.run(tests_of(problem), "\n".join(steps))

    def _passing(self, problem: Problem, programs: Sequence[Sequence[str]]) -> list[bool]:
        tests = tests_of(problem)
        requests = [(tests, "\n".join(program)) for program in programs]
        return [outcome["kind"] == "passed" for outcome in self._verify.process.run_all(requests)]

    def _repair(self, problem: Problem, answer: tuple[str, ...]) -> Repair | CritiqueFailure:
        """Complete the most leading lines of an answer that the nearest worked solution can."""
        codes = problem.meta.get(SOLUTIONS)
        listed = [str(code) for code in codes] if isinstance(codes, list | tuple) else []
        solutions = [
            steps_of_code(code) for code in dict.fromkeys([*listed, problem.answer]) if code
        ]
        passing = self._passing(problem, solutions)
        solutions = [s for s, passes in zip(solutions, passing, strict=True) if passes]
        if not solutions:
            return _failure("no_solution", "no worked solution passes the problem's tests")
        is_long = len(answer) > MAX_STEPS or sum(map(len, answer)) > MAX_CHARACTERS
        short = [] if is_long else [s for s in solutions if len(s) <= MAX_STEPS]
        aligned = sorted((align(answer, s) for s in short), key=lambda a: -a.similarity)
        near = [alignment for alignment in aligned if alignment.similarity >= MIN_SIMILARITY]
        for alignment in near:
            programs = [_completion(answer, alignment, k) for k in range(len(answer) + 1)]
            passes = self._passing(problem, programs)
            if any(passes):  # not so if a name of the solution could not be replaced
                right = max(k for k, passing in enumerate(passes) if passing)
                return Repair(answer, programs[right], right)
        likest = max((alignment.similarity for alignment in aligned), default=0.0)
        return _failure("other_way", f"the nearest of {len(solutions)} is {likest:.0%} similar")

    def _confirmed(
        self, problem: Problem, repair: Repair, outcome: Outcome
    ) -> Repair | CritiqueFailure:
        """Return a repair if the answer's trace departs from the program's at the first wrong line."""
        traced = self._traced(problem, outcome, repair.answer, 0)
        if traced is None or not (events := traced.get("trace")):
            return _at_reported_line(repair, outcome)
        completed = self._traced(problem, outcome, repair.program, traced["calls"])
        if completed is None or not completed.get("trace"):
            return _failure("no_trace", "the completed program cannot be traced")
        departure = _departure(repair, events, completed["trace"])
        if departure is None:
            detail = f"the first {MAX_EVENTS:,} lines that run do the same"
            return _failure("no_trace", detail)
        if departure != repair.right:
            detail = (
                f"line {departure + 1} departs first, line {repair.right + 1} cannot be completed"
            )
            return _failure("ambiguous", detail)
        return repair

    def _traced(
        self, problem: Problem, failed: Outcome, program: Sequence[str], call: int
    ) -> Outcome | None:
        """Run the test that failed alone, and record the lines of a call; None if there is no test."""
        tests = _failed_test(tests_of(problem), failed)
        if tests is None:
            return None
        traced = {**tests, "trace": {"call": call, "events": MAX_EVENTS}}
        return self._verify.process.run(traced, "\n".join(program))

    def _with_error(
        self, problem: Problem, repair: Repair, rng: np.random.Generator
    ) -> tuple[str, ...]:
        """Return the repaired program with an error in the corrected line, else in a random one."""
        program = repair.program
        lines = [i for i in rng.permutation(len(program)).tolist() if not is_remark(program[i])]
        if repair.right in lines:
            lines = [repair.right, *(i for i in lines if i != repair.right)]
        for index in lines:
            wrong = [(*program[:index], m, *program[index + 1 :]) for m in mutants(program[index])]
            failing = [
                candidate
                for candidate, passes in zip(wrong, self._passing(problem, wrong), strict=True)
                if not passes
            ]
            if failing:
                return failing[rng.integers(len(failing))]
        return program


def solutions_of(problem: Problem) -> list[str]:
    """Return the worked solutions of a problem, whether they pass its tests or not."""
    codes = problem.meta.get(SOLUTIONS)
    listed = [str(code) for code in codes] if isinstance(codes, list | tuple) else []
    return [code for code in dict.fromkeys([*listed, problem.answer]) if code.strip()]


def _completion(answer: Sequence[str], alignment: Alignment, count: int) -> tuple[str, ...]:
    return (*answer[:count], *alignment.solution[alignment.starts[count] :])


def _is_cut(repair: Repair) -> bool:
    """Return True if only the last line of a truncated answer is not right: it may be unfinished."""
    return repair.right >= len(repair.answer) - 1


def _failed_test(tests: Tests, outcome: Outcome) -> Tests | None:
    """Return the tests with the one alone that failed; all of a single function's."""
    number = outcome.get("passed", 0)
    match tests["shape"]:
        case "cases" | "asserts" as shape:
            return (
                {**tests, shape: tests[shape][number : number + 1]}
                if tests[shape][number:]
                else None
            )
        case "check":
            return tests
    return None  # programs are not traced


def _at_reported_line(repair: Repair, outcome: Outcome) -> Repair | CritiqueFailure:
    """Return the repair of code that does not run, if its error is reported at the first wrong line."""
    line, right = outcome.get("line"), repair.right
    if isinstance(line, int) and right < len(repair.answer):
        first = sum(len(step.split("\n")) for step in repair.answer[:right]) + 1
        last = first + len(repair.answer[right].split("\n")) - 1
        # What is not closed is often reported at the line after it.
        if first <= line <= last + (outcome["kind"] == "syntax"):
            return repair
    return _failure("no_trace", f"the answer does not run its tests ({outcome['kind']})")


def _departure(repair: Repair, events: Any, reference: Any) -> int | None:
    """Return the answer's step that first does something else than the completed program's.

    Where the programs go on with different steps, that is the answer's, or the first that is not right
    if the completed program runs a step that the answer lacks. None if the traces are the same.
    """
    ours, theirs = _by_step(repair.answer, events), _by_step(repair.program, reference)
    for (step, effects), other in zip(ours, theirs, strict=False):
        if (step, effects) != other:
            return step if step >= repair.right else repair.right
    if len(ours) == len(theirs):
        return None
    longer = ours if len(ours) > len(theirs) else []
    step = longer[len(theirs)][0] if longer else repair.right
    return max(step, repair.right)


def _by_step(program: Sequence[str], events: Any) -> list[tuple[int, dict[str, Any]]]:
    """Return a trace with steps in the place of lines; what is no event of ours is left out."""
    spans = statement_lines(code := "\n".join(program))
    step_of_line: dict[int, int] = {}
    for index, (begin, end) in enumerate(spans):
        first = code.count("\n", 0, begin) + 1
        step_of_line |= dict.fromkeys(range(first, first + code.count("\n", begin, end) + 1), index)
    trace = []
    for event in events if isinstance(events, list) else []:
        match event:
            case [int(line), dict(effects)] if line in step_of_line:
                following = step_of_line.get(effects.get("0next", 0))
                trace.append((step_of_line[line], {**effects, "0next": following}))
    return trace


def _critique(
    problem: Problem, parts: AnswerParts, repair: Repair, written: tuple[str, ...], *,
    finished: bool, is_right: bool,
) -> Critique:  # fmt: skip
    at = len(parts.before) + repair.right
    first_error = None if is_right or (not finished and _is_cut(repair)) else at
    case: Case = "C" if not finished else "A" if is_right else "D"
    steps = _statuses(parts.steps, parts.rewritten(written))
    is_gold = written == repair.program and problem.answer
    return Critique(case, steps, problem.answer if is_gold else "\n".join(written), first_error)


def _statuses(attempt: Sequence[str], corrected: Sequence[str]) -> tuple[CritiqueStep, ...]:
    """Return the corrected steps: ``kept`` as the attempt has them, the first changed one ``fixed``."""
    keys = [["\n".join(lines_of(step)) for step in steps] for steps in (attempt, corrected)]
    blocks = SequenceMatcher(None, *keys, autojunk=False).get_matching_blocks()
    repeated = {block.b + offset for block in blocks for offset in range(block.size)}
    repeated_in_attempt = {block.a + offset for block in blocks for offset in range(block.size)}
    first = next((i for i in range(len(corrected)) if i not in repeated), None)
    steps = []
    for index, text in enumerate(corrected):
        replaces = index == first and index < len(attempt) and index not in repeated_in_attempt
        status: StepStatus = "kept" if index in repeated else "fixed" if replaces else "new"
        original = text if status == "kept" else attempt[index] if replaces else None
        steps.append(CritiqueStep(text, status, original))
    return tuple(steps)


def _failure(reason: NoOracle, detail: str) -> CritiqueFailure:
    return CritiqueFailure(reason, detail)
