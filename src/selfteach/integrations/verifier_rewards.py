"""Offers verifiers as reward functions of TRL's signature, which ms-swift and others share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from selfteach.config.data_section import Columns
from selfteach.errors import RecipeError
from selfteach.integrations.row_problems import problem_of, rows_of, text_of
from selfteach.protocols import Verifier
from selfteach.tasks import chain_sums
from selfteach.tasks.verifiers import READERS, AnswerIn, build_verifier

VerifierName = Literal["exact", "math", "reasoning_gym", "chain_sums"]
NAMES: tuple[VerifierName, ...] = ("exact", "math", "reasoning_gym", "chain_sums")


class VerifierReward:
    """Scores completions with a verifier, as TRL calls a reward function; `reward_func` builds it.

    It can be pickled, for trainers that score in processes: a named verifier is built again there, a
    function is pickled itself.
    """

    def __init__(
        self, verifier: VerifierName | Verifier, answer_in: AnswerIn, columns: Columns, name: str
    ) -> None:
        self._verifier, self._answer_in, self._columns = verifier, answer_in, columns
        self._verify = _built(verifier, answer_in)
        self.__name__ = name

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """Return 1.0 or 0.0 per completion; None where the row has no answer to compare with."""
        scores: list[float | None] = []
        rows = rows_of(prompts, columns)
        for number, (row, completion) in enumerate(zip(rows, completions, strict=True)):
            problem = problem_of(row, number, self._columns)
            text = text_of(completion)
            scores.append(None if problem is None else float(self._verify(problem, text).correct))
        return scores

    def __reduce__(self) -> tuple[Any, ...]:
        values = (self._verifier, self._answer_in, self._columns, self.__name__)
        return VerifierReward, values


def reward_func(
    verifier: VerifierName | Verifier = "exact",
    *,
    answer_in: AnswerIn = "tag",
    question: str = "question",
    answer: str = "answer",
    name: str | None = None,
) -> VerifierReward:
    """Return a verifier as a reward function: 1.0 for a right final answer, 0.0 for another one.

    ``verifier`` is a name, as ``data.verifier`` in a recipe, or an object. ``answer_in`` says where a
    completion's final answer is: ``tag`` (``<answer>…</answer>``), ``boxed`` or ``tag_or_boxed``.
    ``question`` and ``answer`` name columns, if they are not recognised by their usual names. A row
    whose answer is null has the reward None. Thoughts are not read. ``name`` is what the trainer
    logs.

    Raises `RecipeError` or `DataError` in one line: here for an unknown verifier or one whose package
    is not installed, and at the first batch for columns that are not there.
    """
    kind = verifier if isinstance(verifier, str) else getattr(verifier, "__name__", "verifier")
    columns = Columns(question=question, answer=answer)
    return VerifierReward(verifier, answer_in, columns, name or f"{kind}_reward")


def _built(verifier: VerifierName | Verifier, answer_in: AnswerIn) -> Verifier:
    """Return a verifier by its name in a recipe; an object is returned as it is.

    Raises `RecipeError` for an unknown name, and `DataError` for a package that is not installed.
    """
    if not isinstance(verifier, str):
        if not callable(verifier):
            raise RecipeError(f"verifier = {verifier!r}: neither a name nor a function")
        return verifier
    if verifier not in NAMES:
        raise RecipeError(f"verifier = {verifier!r}: one of {', '.join(NAMES)}, or a function")
    if answer_in not in READERS:
        raise RecipeError(f"answer_in = {answer_in!r}: one of {', '.join(READERS)}")
    return chain_sums.verify if verifier == "chain_sums" else build_verifier(verifier, answer_in)[0]
