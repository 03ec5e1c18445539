"""Verifiers of final answers given as text: where the answer stands, and what equals it."""

from __future__ import annotations

import importlib.util
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from selfteach.errors import DataError
from selfteach.tasks.verify_client import Judge
from selfteach.types import Problem, Verdict

AnswerIn = Literal["tag", "boxed", "tag_or_boxed"]

ANSWER = re.compile(r"<answer>(.*?)(?:</answer>|$)", re.DOTALL)
BOX = re.compile(r"\\f?boxed\s*\{")


def final_answer(text: str) -> str | None:
    """What stands in the last ``<answer>`` tag, or None."""
    found = ANSWER.findall(text)
    return found[-1].strip() or None if found else None


def last_boxed(text: str) -> str | None:
    """What stands in the last ``\\boxed{}`` whose braces close, or None."""
    for begin in reversed(list(BOX.finditer(text))):
        depth, escaped = 1, False
        for end in range(begin.end(), len(text)):
            char = text[end]
            depth += 0 if escaped else (char == "{") - (char == "}")
            escaped = char == "\\" and not escaped
            if depth == 0:
                return text[begin.end() : end].strip() or None
    return None


def tag_or_boxed(text: str) -> str | None:
    """The tagged answer, out of its box if it stands in one; without a tag, the last box."""
    tagged = final_answer(text)
    if tagged is None:
        return last_boxed(text)
    return last_boxed(tagged) or tagged


READERS: Mapping[str, Callable[[str], str | None]] = {
    "tag": final_answer,
    "boxed": last_boxed,
    "tag_or_boxed": tag_or_boxed,
}


def write_answer(answer: str, answer_in: AnswerIn = "tag") -> str:
    """The shortest text that states a final answer."""
    return f"\\boxed{{{answer}}}" if answer_in == "boxed" else f"<answer>{answer}</answer>"


@dataclass(frozen=True, slots=True)
class Exact:
    """Right if the answer is the problem's, white space apart."""

    answer_in: AnswerIn = "tag"

    def __call__(self, problem: Problem, text: str) -> Verdict:
        """Judge an answer's text."""
        found = READERS[self.answer_in](text)
        parsed = " ".join(found.split()) if found is not None else None
        return Verdict.of_final(parsed == " ".join(problem.answer.split()), parsed)


exact = Exact()
"""Reads ``<answer>…</answer>``."""


class Math:
    """Right if the answer equals the problem's as mathematics (math-verify).

    A problem whose own answer is no mathematics takes the same text alone. What cannot be compared in
    time is wrong. Raises `DataError` if math-verify is not installed.
    """

    def __init__(self, answer_in: AnswerIn = "tag", judge: Judge | None = None) -> None:
        if importlib.util.find_spec("math_verify") is None:
            raise DataError(
                'data.verifier = "math" needs math-verify: pip install "selfteach[math]"'
            )
        self._read, self._judge = READERS[answer_in], judge or Judge()

    def __call__(self, problem: Problem, text: str) -> Verdict:
        """Judge an answer's text. Right answers have one canonical form, the problem's own."""
        found = self._read(text)
        if found is None:
            return Verdict.of_final(False, None)
        correct = self.same(problem.answer, found)
        return Verdict.of_final(correct, problem.answer if correct else " ".join(found.split()))

    def same(self, a: str, b: str) -> bool:
        """Whether two final answers are one. Not symmetric for sets and relations: ``a`` is gold."""
        said = self._judge.ask("math", gold=a, found=b)
        if said.get("understood") is False:
            return a.split() == b.split()
        return bool(said.get("equal"))


class Gym:
    """Right if reasoning-gym's own scorer gives full marks; the problem's ``meta`` says which.

    Raises `DataError` if reasoning-gym is not installed.
    """

    def __init__(self, answer_in: AnswerIn = "tag", judge: Judge | None = None) -> None:
        if importlib.util.find_spec("reasoning_gym") is None:
            raise DataError(
                'data.verifier = "reasoning_gym" needs reasoning-gym: '
                'pip install "selfteach[problems]"'
            )
        self._read, self._judge = READERS[answer_in], judge or Judge()

    def __call__(self, problem: Problem, text: str) -> Verdict:
        """Judge an answer's text. Raises `DataError` for a problem from elsewhere."""
        source = problem.meta.get("reasoning_gym")
        if not isinstance(source, Mapping):
            raise DataError(
                f"problem {problem.id!r} is none of reasoning-gym's: its meta does not say which"
            )
        found = self._read(text)
        if found is None:
            return Verdict.of_final(False, None)
        entry = {
            "question": problem.question,
            "answer": problem.answer or None,
            "metadata": source["metadata"],
        }
        said = self._judge.ask(
            "gym", task=source["task"], config=source["config"], entry=entry, answer=found
        )
        correct = said.get("score", 0.0) >= 1.0
        told = problem.answer if correct and problem.answer else " ".join(found.split())
        return Verdict.of_final(correct, told)


@dataclass(frozen=True, slots=True)
class Form:
    """How a final answer of one kind of problem is written, and when two of them are one."""

    write: Callable[[str], str] = write_answer
    """The shortest text that states an answer."""
    same: Callable[[str, str], bool] = operator.eq
    """Of two answers in the verifier's canonical form."""


def build_verifier(name: str, answer_in: AnswerIn) -> tuple[Any, Form]:
    """A verifier of tagged or boxed answers by its name in a recipe, with the answers' form."""

    def write(answer: str) -> str:
        return write_answer(answer, answer_in)

    match name:
        case "math":
            judge = Math(answer_in)
            return judge, Form(write, judge.same)
        case "reasoning_gym":
            return Gym(answer_in), Form(write)
        case _:
            return Exact(answer_in), Form(write)
