"""Inspections of code: where the first error comes from, and programs that were cut off."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from selfteach.commands.critique import _true_critique
from selfteach.commands.inspect.answer_rows import LocatedRollout, locate_errors
from selfteach.tasks.code.code_steps import code_steps
from selfteach.types import Critique, CritiquedRollout, CritiqueFailure, Problem, Rollout, Verdict

TEXT = "```python\ndef f(x):\n    return x\n```"
ROLLOUT = Rollout(Problem("p", "q", "a"), 0, (1,), (5,), (0.0,), TEXT, True, 0)
CHECKED = Critique("D", (), "a", 1)
BY_CRITIC = Critique("D", (), "a", 2)


def oracle_of(critique: Critique | CritiqueFailure):
    def oracle(problem: Problem, text: str, *, finished: bool, error_rate: float,
               rng: np.random.Generator) -> Critique | CritiqueFailure:  # fmt: skip
        return critique

    return oracle


def located(critique: Critique | None, oracle: Critique | CritiqueFailure | None) -> LocatedRollout:
    built = SimpleNamespace(
        components=SimpleNamespace(split_steps=code_steps),
        task=SimpleNamespace(oracle=None if oracle is None else oracle_of(oracle)),
    )
    one = CritiquedRollout(ROLLOUT, Verdict(False, True, "def"), critique)
    return locate_errors(built, [one])[0]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("critique", "oracle", "expected"),
    [
        (BY_CRITIC, CHECKED, (True, "oracle", 1)),
        (BY_CRITIC, CritiqueFailure("other_way"), (True, "critic", 2)),
        (None, CritiqueFailure("other_way"), (False, None, None)),
        (BY_CRITIC, None, (True, "critic", 2)),
        # A program that was cut off has no wrong step, and no final answer apart from its steps.
        (None, Critique("C", (), "a", None), (True, "oracle", None)),
    ],
)
def test_the_first_error_is_the_oracles_where_it_can_check(
    critique: Critique | None,
    oracle: Critique | CritiqueFailure | None,
    expected: tuple[bool, str | None, int | None],
) -> None:
    one = located(critique, oracle)
    is_located, source, first = expected
    assert (one.located, one.first_error) == (is_located, first)
    assert source is None or one.source == source


def test_what_the_oracle_cannot_check_is_no_false_alarm() -> None:
    assert _true_critique(oracle_of(CritiqueFailure("ambiguous")), ROLLOUT) is None
    assert _true_critique(oracle_of(CHECKED), ROLLOUT) == CHECKED
