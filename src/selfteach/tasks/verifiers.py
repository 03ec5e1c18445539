"""Verifies final answers: extracts the answer from a text and compares it with the gold answer."""

from __future__ import annotations

import importlib.util
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from selfteach.config.code_section import CodeConfig
from selfteach.errors import DataError
from selfteach.protocols import Reward, Verifier
from selfteach.tasks import math_answers
from selfteach.tasks.code.answer_code import write_code
from selfteach.tasks.code.code_pool import CodePool
from selfteach.tasks.code.code_verifier import CodeVerifier, wrong_code
from selfteach.tasks.final_answers import final_answer, last_boxed, tag_or_boxed, unwrapped
from selfteach.tasks.verify_client import VerifierProcess
from selfteach.types import Problem, Rollout, Verdict

AnswerIn = Literal["tag", "boxed", "tag_or_boxed"]

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
    """Accepts an answer that equals the gold answer as text, up to white space.

    What Markdown or LaTeX puts around the whole of either (``**5**``, ``$5$``) makes no difference.
    """

    answer_in: AnswerIn = "tag"

    def __call__(self, problem: Problem, text: str) -> Verdict:
        """Return the verdict on an answer's text."""
        answer = READERS[self.answer_in](text)
        parsed = " ".join(answer.split()) if answer is not None else None
        gold = " ".join(problem.answer.split())
        correct = parsed is not None and (parsed == gold or unwrapped(parsed) == unwrapped(gold))
        return Verdict.of_final(correct, gold if correct else parsed)


exact = ExactVerifier()
"""An exact verifier that reads ``<answer>…</answer>``."""


class MathVerifier:
    """Accepts an answer that is mathematically equal to the gold answer (math-verify).

    Both are read wholly or not at all (`math_answers`): a gold answer that is not understood accepts
    only the same text. A comparison that times out counts as wrong, with ``timed_out`` in its verdict.
    Raises `DataError` if math-verify is not installed.
    """

    def __init__(self, answer_in: AnswerIn = "tag", process: VerifierProcess | None = None) -> None:
        if importlib.util.find_spec("math_verify") is None:
            raise DataError(
                'data.verifier = "math" needs math-verify: pip install "selfteach[math]"'
            )
        self._read = READERS[answer_in]
        self.process = process or VerifierProcess()

    def __call__(self, problem: Problem, text: str) -> Verdict:
        """Return the verdict on an answer's text; ``parsed`` of a right one is the gold answer."""
        answer = self._read(text)
        if answer is None:
            return Verdict.of_final(False, None)
        replies: list[Mapping[str, Any]] = []

        def equal(gold: str, answer: str) -> bool:
            replies.append(self.process.request("math", gold=gold, answer=answer))
            return bool(replies[-1].get("equal"))

        correct = math_answers.equivalent(problem.answer, answer, equal)
        parsed = problem.answer if correct else " ".join(answer.split())
        verdict = Verdict.of_final(correct, parsed)
        return replace(verdict, timed_out=any("timed_out" in reply for reply in replies))

    def equivalent(self, gold: str, answer: str) -> bool:
        """Return whether two final answers are equal. Not symmetric for sets and relations."""
        return math_answers.equivalent(gold, answer, self._equal)

    def _equal(self, gold: str, answer: str) -> bool:
        reply = self.process.request("math", gold=gold, answer=answer)
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
        self._read = READERS[answer_in]
        self.process = process or VerifierProcess()

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
        reply = self.process.request(
            "gym", task=source["task"], config=source["config"], entry=entry, answer=answer
        )
        correct = reply.get("score", 0.0) >= 1.0
        parsed = problem.answer if correct and problem.answer else " ".join(answer.split())
        return replace(Verdict.of_final(correct, parsed), timed_out="timed_out" in reply)


class WithoutAnswers:
    """Wraps a verifier for problems of which some have no answer: no rollout of these is right."""

    def __init__(self, verify: Verifier) -> None:
        self._verify = verify
        self.process = getattr(verify, "process", None)

    def __call__(self, problem: Problem, text: str) -> Verdict:
        """Return the verdict on a text; without an answer to compare with it says what was parsed."""
        verdict = self._verify(problem, text)
        return verdict if problem.answer else replace(verdict, correct=False, feedback=None)


def keep_timeouts(verify: Verifier, path: Path) -> None:
    """Store a verifier's timed-out comparisons in a file, so that a resume judges as before."""
    process = getattr(verify, "process", None)
    if isinstance(process, VerifierProcess | CodePool):
        process.keep_timeouts(path)


def verify_all(verify: Verifier, answers: Sequence[tuple[Problem, str]]) -> list[Verdict]:
    """Return the verdicts on many answers, in order; side by side where the verifier can."""
    if isinstance(verify, CodeVerifier):
        return verify.verify_all(answers)
    return [verify(problem, text) for problem, text in answers]


def verify_rollouts(verify: Verifier, rollouts: Sequence[Rollout]) -> list[Verdict]:
    """Return the verdicts on rollouts, in order: of an episode its environment's, where that gives one;
    else the verifier's on the last turn."""
    rest = [rollout for rollout in rollouts if rollout.verdict is None]
    verified = iter(verify_all(verify, [(one.problem, one.answer_text) for one in rest]))
    return [one.verdict if one.verdict is not None else next(verified) for one in rollouts]


def verdicts_of(
    rollouts: Sequence[Rollout], verify: Verifier, reward: Reward | None
) -> list[Verdict]:
    """Return the verdict of each rollout, with the rewards if there are any."""
    verdicts = verify_rollouts(verify, rollouts)
    return reward(list(zip(rollouts, verdicts, strict=True))) if reward is not None else verdicts


@dataclass(frozen=True, slots=True)
class AnswerFormat:
    """Describes how a final answer of one kind of problem is written, and when two are equivalent."""

    write: Callable[[str], str] = write_answer
    """Returns the shortest text that states an answer."""
    equivalent: Callable[[str, str], bool] = operator.eq
    """Compares two answers in the verifier's canonical form."""
    corrupted: Callable[[Problem], Iterable[str]] | None = None
    """Returns wrong answers to a problem, which the verifier must reject; None: `audit.corruptions`."""


def build_verifier(
    name: str, answer_in: AnswerIn, code: CodeConfig | None = None
) -> tuple[Any, AnswerFormat]:
    """Build a verifier of answers by its name in a recipe, with the answers' format."""

    def write(answer: str) -> str:
        return write_answer(answer, answer_in)

    match name:
        case "math":
            verifier = MathVerifier(answer_in)
            return verifier, AnswerFormat(write, verifier.equivalent)
        case "code":
            return CodeVerifier(code), AnswerFormat(write_code, corrupted=wrong_code)
        case "reasoning_gym":
            return ReasoningGymVerifier(answer_in), AnswerFormat(write)
        case _:
            return ExactVerifier(answer_in), AnswerFormat(write)
