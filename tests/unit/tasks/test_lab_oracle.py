"""Test the lab's oracle: the corrected trace of any answer is a derivation of the truth."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selfteach.tasks.lab import lab_oracle
from selfteach.tasks.lab.checker import check, parse_line
from selfteach.tasks.lab.corpus import Believer, write
from selfteach.tasks.lab.world import ROOT, STYLES, SYMBOLS, World, text_of
from selfteach.types import Critique

WORLD = World()
WORDS = [*SYMBOLS, *"01234", *(m for s in STYLES.values() for m in s.marks), "!", "#", "ok"]

questions = st.tuples(*[st.sampled_from(SYMBOLS)] * 6)
seeds = st.integers(0, 2**32 - 1)


Case = tuple[tuple[str, ...], int, str, int, list[tuple[int, str]]]

# Drawn as plain values and written by `written` inside the test: jaxtyping's hook draws random numbers
# itself, which hypothesis does not allow while it draws.
cases = st.tuples(
    questions,
    seeds,
    st.sampled_from(["whole", "cut", "garbled"]),
    st.integers(0, 32),
    st.lists(st.tuples(st.integers(0, 31), st.sampled_from(WORDS)), min_size=1, max_size=2),
)


def written(case: Case) -> tuple[tuple[str, ...], str]:
    """Return a question and a writer's answer to it, perhaps truncated or garbled."""
    question, seed, damage, length, changes = case
    rng = np.random.default_rng(seed)
    words = write(WORLD, question, Believer(WORLD, rng), rng).split()
    assert len(words) == 32
    if damage == "cut":
        words = words[:length]
    elif damage == "garbled":
        for at, word in changes:
            words[at] = word
    return question, " ".join(words)


def unflagged(critique: Critique) -> str:
    """Return the trace as a solver would write it."""
    texts = []
    for step in critique.steps:
        words = step.text.split()
        words[4] = next(s.marks[1] for s in STYLES.values() if s.marks[0] == words[1])
        texts.append(" ".join(words))
    return "\n".join([*texts, f"# {critique.answer}"])


@settings(max_examples=300, deadline=None)
@given(cases)
def test_the_trace_is_right_and_complete(case: Case) -> None:
    question, text = written(case)
    critique = lab_oracle.critique_rollout(WORLD, question, text)
    again = check(WORLD, question, unflagged(critique))
    assert again.first_error is None
    assert len(again.steps) == 5
    assert critique.answer == again.answer == WORLD.truth(question)[ROOT]


@settings(max_examples=300, deadline=None)
@given(cases)
def test_right_steps_stay_verbatim_up_to_the_first_error(case: Case) -> None:
    question, text = written(case)
    critique = lab_oracle.critique_rollout(WORLD, question, text)
    checked = check(WORLD, question, text)
    stop = len(checked.steps) if checked.first_error is None else checked.first_error
    repeated = [step.text for step in critique.steps if step.status == "kept"]
    assert repeated == [step.text for step in checked.steps[:stop]]
    assert [step.status for step in critique.steps[:stop]] == ["kept"] * stop
    fixed = [i for i, step in enumerate(critique.steps) if step.status == "fixed"]
    # Five right lines are the whole derivation: a wrong one after them has no correction.
    assert fixed == ([] if checked.first_error is None or stop == 5 else [stop])
    assert critique.first_error == checked.first_error


@settings(max_examples=300, deadline=None)
@given(cases)
def test_the_corrected_line_is_flagged_and_does_not_quote_the_wrong_value(
    case: Case,
) -> None:
    question, text = written(case)
    critique = lab_oracle.critique_rollout(WORLD, question, text)
    for step in critique.steps:
        assert ("!" in step.text.split()) == (step.status == "fixed")
        if step.status == "fixed":
            assert step.original is not None
            wrong = parse_line(step.original)
            if wrong is not None and check(WORLD, question, text).steps[
                critique.first_error or 0
            ].error == "value":  # fmt: skip
                assert step.text.split()[-1] != wrong.c
                assert step.text.split()[:4] == step.original.split()[:4], "same node and operands"


@settings(max_examples=100, deadline=None)
@given(cases)
def test_the_critique_of_a_trace_has_no_error(case: Case) -> None:
    question, text = written(case)
    trace = unflagged(lab_oracle.critique_rollout(WORLD, question, text))
    again = lab_oracle.critique_rollout(WORLD, question, trace)
    assert (again.case, again.first_error) == ("A", None)
    assert "\n".join([*(s.text for s in again.steps), f"# {again.answer}"]) == trace


@settings(max_examples=300, deadline=None)
@given(cases, seeds)
def test_a_critic_that_always_errs_is_wrong_at_the_step_it_flags(case: Case, seed: int) -> None:
    question, text = written(case)
    checked = check(WORLD, question, text)
    rng = np.random.default_rng(seed)
    critique = lab_oracle.critique_rollout(WORLD, question, text, error_rate=1.0, rng=rng)
    assert critique.first_error is not None
    if checked.first_error is not None and checked.first_error < 5:
        assert critique.first_error == checked.first_error
    fixed = next(step for step in critique.steps if step.status == "fixed")
    node, _, *operands, _, value = fixed.text.split()
    if fixed.text.split()[1] == "<":
        operands.reverse()
    assert value != WORLD.table[operands[0], operands[1]]
    assert value != WORLD.truth(question)[int(node)]
    # It continues from the wrong value by right look-ups, and its answer is the trace's last value.
    last = next(step for step in critique.steps if step.text.split()[0] == str(ROOT))
    assert critique.answer == last.text.split()[-1]


def test_the_error_rate_is_the_share_of_erring_critiques() -> None:
    question = next(WORLD.questions("train"))
    text = text_of(WORLD.solution(question, STYLES["plus"]), WORLD.truth(question)[ROOT])
    rng = np.random.default_rng(0)
    erred = [
        lab_oracle.critique_rollout(WORLD, question, text, error_rate=0.3, rng=rng).first_error
        is not None
        for _ in range(1000)
    ]
    assert np.mean(erred) == pytest.approx(0.3, abs=0.05)  # standard deviation 0.014


def test_the_four_cases() -> None:
    question = next(WORLD.questions("train"))
    truth = WORLD.truth(question)
    lines = WORLD.solution(question, STYLES["minus"])
    right = text_of(lines, truth[ROOT])
    wrong = "a" if truth[ROOT] != "a" else "b"

    def case(text: str, finished: bool = True) -> str:
        return lab_oracle.critique_rollout(WORLD, question, text, finished=finished).case

    assert case(right) == "A"
    assert case(text_of(lines, wrong)) == "D", "right steps, wrong answer"
    assert case(text_of(lines[:3], None), finished=False) == "C"
    assert case(text_of(lines, None)) == "D", "no answer is no right answer"


@pytest.mark.parametrize("style", ["plus", "minus", "angle"])
def test_the_continuation_keeps_the_answer_s_style_and_order(style: str) -> None:
    question = next(WORLD.questions("train"))
    lines = WORLD.solution(question, STYLES[style])
    critique = lab_oracle.critique_rollout(
        WORLD, question, text_of(lines[:2], None), finished=False
    )
    assert [step.text for step in critique.steps] == [str(line) for line in lines]
    assert [step.status for step in critique.steps] == ["kept"] * 2 + ["new"] * 3


@pytest.mark.parametrize("text", ["", "nothing of use", "# k", "0", "\n\n"])
def test_an_answer_without_a_line_gets_a_whole_solution(text: str) -> None:
    question = next(WORLD.questions("train"))
    critique = lab_oracle.critique_rollout(WORLD, question, text)
    assert check(WORLD, question, unflagged(critique)).first_error is None
    assert len(critique.steps) == 5 and critique.case == "D"


def test_a_line_after_the_root_is_left_out() -> None:
    question = tuple("cafebd")
    lines = WORLD.solution(question, STYLES["plus"])
    text = text_of([*lines, lines[2]], None) + "\n# a"
    critique = lab_oracle.critique_rollout(WORLD, question, text)
    assert critique.first_error == len(lines)
    assert [step.text for step in critique.steps] == [str(line) for line in lines]
    assert critique.answer == WORLD.truth(question)[ROOT]


@pytest.mark.parametrize("sixth", ["4 + a b = c", "0 + a", "2"])
def test_a_line_after_the_whole_derivation_ends_the_trace(sixth: str) -> None:
    question = next(WORLD.questions("train"))
    lines = list(map(str, WORLD.solution(question, STYLES["plus"])))
    text = "\n".join([*lines, sixth, f"# {WORLD.truth(question)[ROOT]}"])
    critique = lab_oracle.critique_rollout(WORLD, question, text)
    assert [step.text for step in critique.steps] == lines
    assert {step.status for step in critique.steps} == {"kept"}
    assert (critique.case, critique.first_error) == ("D", 5)
    rng = np.random.default_rng(0)
    erring = lab_oracle.critique_rollout(WORLD, question, text, error_rate=1.0, rng=rng)
    assert [step.status for step in erring.steps].count("fixed") == 1
    assert erring.answer != critique.answer or [s.text for s in erring.steps] != lines
