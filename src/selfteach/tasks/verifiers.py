"""Verifies final answers: extracts the answer from a text and compares it with the gold answer."""

from __future__ import annotations

import importlib.util
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from selfteach.errors import DataError
from selfteach.tasks.verify_client import VerifierProcess
from selfteach.types import Problem, Verdict

AnswerIn = Literal["tag", "boxed", "tag_or_boxed"]

ANSWER = re.compile(r"<answer>(.*?)(?:</answer>|$)", re.DOTALL)
BOX = re.compile(r"\\f?boxed\s*\{")


def final_answer(text: str) -> str | None:
    """Return the content of the last ``<answer>`` tag, or None."""
    contents = ANSWER.findall(text)
    return contents[-1].strip() or None if contents else None


def last_boxed(text: str) -> str | None:
    """Return the content of the last ``\\boxed{}`` whose braces close, or None."""
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
    """Return the tagged answer, unboxed if it is boxed; without a tag, the content of the last box."""
    tagged = final_answer(text)
    if tagged is None:
        return last_boxed(text)
    return last_boxed(tagged) or tagged


READERS: Mapping[str, Callable[[str], str | None]] = {
    "tag": final_answer,
    "boxed": last_boxed,
    "tag_or_boxed": tag_or_boxed,
}
"""Functions that extract a final answer from a text, by the recipe's ``answer_in``."""


def write_answer(answer: str, answer_in: AnswerIn = "tag") -> str:
    """Return the shortest text that states a final answer."""
    return f"\\boxed{{{answer}}}" if answer_in == "boxed" else f"<answer>{answer}</answer>"


@dataclass(frozen=True, slots=True)
class ExactVerifier:
    """Accepts an answer that equals the gold answer as text, up to white space."""

    answer_in: AnswerIn = "tag"

    def __call__(self, problem: Problem, text: str) -> Verdict:
        """Return the verdict on an answer's text."""
        answer = READERS[self.answer_in](text)
        parsed = " ".join(answer.split()) if answer is not None else None
        return Verdict.of_final(parsed == " ".join(problem.answer.split()), parsed)


exact = ExactVerifier()
"""An exact verifier that reads ``<answer>…</answer>``."""


class MathVerifier:
    """Accepts an answer that is mathematically equal to the gold answer (math-verify).

    If the gold answer does not parse as mathematics, only the same text is accepted. A comparison that
    times out counts as wrong. Raises `DataError` if math-verify is not installed.
    """

    def __init__(self, answer_in: AnswerIn = "tag", process: VerifierProcess | None = None) -> None:
        if importlib.util.find_spec("math_verify") is None:
            raise DataError(
                'data.verifier = "math" needs math-verify: pip install "selfteach[math]"'
            )
        self._read, self._process = READERS[answer_in], process or VerifierProcess()

    def __call__(self, problem: Problem, text: str) -> Verdict:
        """Return the verdict on an answer's text; ``parsed`` of a right one is the gold answer."""
        answer = self._read(text)
        if answer is None:
            return Verdict.of_final(False, None)
        correct = self.equivalent(problem.answer, answer)
        return Verdict.of_final(correct, problem.answer if correct else " ".join(answer.split()))

    def equivalent(self, gold: str, answer: str) -> bool:
        """Return whether two final answers are equal. Not symmetric for sets and relations."""
        reply = self._process.request("math", gold=gold, answer=answer)
        if reply.get("understood") is False:
            return gold.split() == answer.split()
        return bool(reply.get("equal"))


class ReasoningGymVerifier:
    """Accepts an answer that reasoning-gym's scorer gives a score of 1.

    The problem's ``meta["reasoning_gym"]`` names the generator. Raises `DataError` if reasoning-gym is
    not installed.
    """

    def __init__(self, answer_in: AnswerIn = "tag", process: VerifierProcess | None = None) -> None:
        if importlib.util.find_spec("reasoning_gym") is None:
            raise DataError(
                'data.verifier = "reasoning_gym" needs reasoning-gym: '
                'pip install "selfteach[problems]"'
            )
        self._read, self._process = READERS[answer_in], process or VerifierProcess()

    def __call__(self, problem: Problem, text: str) -> Verdict:
        """Return the verdict on a text. Raises `DataError` for a problem of another source."""
        source = problem.meta.get("reasoning_gym")
        if not isinstance(source, Mapping):
            raise DataError(
                f"problem {problem.id!r} is not from reasoning-gym: its meta names no generator"
            )
        answer = self._read(text)
        if answer is None:
            return Verdict.of_final(False, None)
        entry = {
            "question": problem.question,
            "answer": problem.answer or None,
            "metadata": source["metadata"],
        }
        reply = self._process.request(
            "gym", task=source["task"], config=source["config"], entry=entry, answer=answer
        )
        correct = reply.get("score", 0.0) >= 1.0
        parsed = problem.answer if correct and problem.answer else " ".join(answer.split())
        return Verdict.of_final(correct, parsed)


@dataclass(frozen=True, slots=True)
class AnswerFormat:
    """Describes how a final answer of one kind of problem is written, and when two are equivalent."""

    write: Callable[[str], str] = write_answer
    """Returns the shortest text that states an answer."""
    equivalent: Callable[[str, str], bool] = operator.eq
    """Compares two answers in the verifier's canonical form."""


def build_verifier(name: str, answer_in: AnswerIn) -> tuple[Any, AnswerFormat]:
    """Build a verifier of tagged or boxed answers by its name in a recipe, with the answers' format."""

    def write(answer: str) -> str:
        return write_answer(answer, answer_in)

    match name:
        case "math":
            verifier = MathVerifier(answer_in)
            return verifier, AnswerFormat(write, verifier.equivalent)
        case "reasoning_gym":
            return ReasoningGymVerifier(answer_in), AnswerFormat(write)
        case _:
            return ExactVerifier(answer_in), AnswerFormat(write)
