"""Parsing a critic's reply into a critique, or into the reason why it is none."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfteach.feedback.alignment import first_change
from selfteach.feedback.critics.parser import CritiqueParser
from selfteach.tasks import chain_sums, segmentation, verifiers
from selfteach.types import (
    Critique,
    CritiquedRollout,
    CritiqueFailure,
    FirstChange,
    Problem,
    Rollout,
)

PROBLEM = Problem("p", "Tom has 3 bags of 4 apples and eats 2. How many are left?", "10")
PARSER = CritiqueParser(segmentation.tags, verifiers.exact)
WRONG = (
    "<step_1>3 bags of 4 are 12 apples.</step_1>\n"
    "<step_2>He eats 2, so 12 - 2 = 9.</step_2>\n<answer>9</answer>"
)
RIGHT = WRONG.replace("= 9", "= 10").replace("<answer>9", "<answer>10")


def rollout(text: str, finished: bool = True) -> Rollout:
    return Rollout(PROBLEM, 0, (1,), (5,), (-0.5,), text, finished, 0)


def parse(text: str, answer: str = WRONG, *, finished: bool = True, cut: bool = False):
    attempt = rollout(answer, finished)
    return PARSER(text, attempt, verifiers.exact(PROBLEM, answer), finished=not cut)


def outcome(critique: Critique | CritiqueFailure) -> str:
    return critique.reason if isinstance(critique, CritiqueFailure) else critique.case


def test_the_four_cases() -> None:
    assert outcome(parse(RIGHT, RIGHT)) == "A"
    inserted = RIGHT.replace("<step_2>", "<step_2>So there are 12 at first.</step_2>\n<step_3>")
    inserted = inserted.replace("= 10.</step_2>", "= 10.</step_3>")
    assert outcome(parse(inserted, RIGHT)) == "B"
    assert outcome(parse(RIGHT, WRONG[:60], finished=False)) == "C"
    assert outcome(parse(RIGHT, WRONG)) == "D"


def test_steps_are_kept_fixed_or_new() -> None:
    longer = RIGHT.replace("<answer>", "<step_3>So 10 are left.</step_3>\n<answer>")
    critique = parse(f"<think>He eats two...</think>\n<case>D</case>\n{longer}")
    assert isinstance(critique, Critique)
    assert [(s.status, s.text, s.original) for s in critique.steps] == [
        ("kept", "3 bags of 4 are 12 apples.", "3 bags of 4 are 12 apples."),
        ("fixed", "He eats 2, so 12 - 2 = 10.", "He eats 2, so 12 - 2 = 9."),
        ("new", "So 10 are left.", None),
    ]
    assert (critique.case, critique.first_error, critique.answer) == ("D", 1, "10")


def test_an_inserted_step_is_new_and_the_rest_is_kept() -> None:
    answer = "<step_1>First one.</step_1><step_2>Last one.</step_2><answer>10</answer>"
    critique = parse(
        "<step_1>First one.</step_1><step_2>Why.</step_2><step_3>Last one.</step_3>"
        "<answer>10</answer>",
        answer,
    )
    assert isinstance(critique, Critique)
    assert [s.status for s in critique.steps] == ["kept", "new", "kept"]
    assert (critique.case, critique.first_error) == ("B", None)


def test_a_wrong_step_behind_a_right_answer_is_an_error() -> None:
    lucky = RIGHT.replace("are 12 apples", "are 13 apples")
    critique = parse(RIGHT, lucky)
    assert isinstance(critique, Critique)
    assert (critique.case, critique.first_error, critique.steps[0].status) == ("B", 0, "fixed")


def test_only_the_final_answer_was_wrong() -> None:
    critique = parse(RIGHT, RIGHT.replace("<answer>10", "<answer>12"))
    assert isinstance(critique, Critique)
    assert (critique.case, critique.first_error) == ("D", 2)
    assert [s.status for s in critique.steps] == ["kept", "kept"]


def test_a_truncated_step_is_no_error_but_one_before_it_is() -> None:
    cut = "<step_1>3 bags of 4 are 12 apples.</step_1>\n<step_2>He ea"
    assert parse(RIGHT, cut, finished=False).first_error is None  # type: ignore[union-attr]
    slipped = cut.replace("12 apples", "14 apples")
    assert parse(RIGHT, slipped, finished=False).first_error == 0  # type: ignore[union-attr]


OTHER = "<step_1>Count all seven wheels.</step_1><answer>10</answer>"


@pytest.mark.parametrize(
    "text, cut, expected",
    [
        ("", False, "empty"),
        (" \n", False, "empty"),
        ("<think>All is well.</think>", False, "empty"),
        (RIGHT[:-20], True, "truncated"),
        ("<think>It goes on and", True, "truncated"),
        ("Looks fine to me!", False, "malformed"),
        ("<answer>10</answer>", False, "malformed"),
        (RIGHT.replace("step_2", "step_3"), False, "malformed"),
        (WRONG + "\n" + RIGHT, False, "malformed"),
        (OTHER, False, "misaligned"),
        (WRONG, False, "wrong_answer"),
        (OTHER.replace("10", "7"), False, "misaligned"),
    ],
)
def test_a_failure_has_a_kind_and_a_detail(text: str, cut: bool, expected: str) -> None:
    critique = parse(text, cut=cut)
    assert outcome(critique) == expected
    assert isinstance(critique, CritiqueFailure) and critique.detail


def test_a_rollout_without_steps_can_be_critiqued() -> None:
    critique = parse(RIGHT, "no idea")
    assert isinstance(critique, Critique)
    assert (critique.case, critique.first_error, {s.status for s in critique.steps}) == (
        "D",
        0,
        {"new"},
    )


def test_lines_are_parsed_by_the_task_s_splitter() -> None:
    problem = Problem("c", f"{chain_sums.PREFIX}8 + 5 - 6 =", "7", meta={})
    parser = CritiqueParser(chain_sums.split_spans, chain_sums.verify)
    answer = Rollout(problem, 0, (1,), (5,), (-0.5,), "8 + 5 = 12\n12 - 6 = 6\nAnswer: 6", True, 0)
    verdict = chain_sums.verify(problem, answer.text)
    critique = parser("8 + 5 = 13\n13 - 6 = 7\nAnswer: 7", answer, verdict)
    assert isinstance(critique, Critique)
    assert (critique.case, critique.first_error, critique.answer) == ("D", 0, "7")
    assert [s.status for s in critique.steps] == ["fixed", "new"]


@pytest.mark.parametrize("name", ["lines", "paragraphs", "sentences"])
@pytest.mark.parametrize(
    "end", ["\n<answer>9</answer>", " <answer>9</answer>", "\n\n<answer>9</answer>\n"]
)
def test_a_rollout_without_tags_is_critiqued_in_tags(name: str, end: str) -> None:
    """The template set ``free`` shows the steps to the critic in numbered tags."""
    gap = "\n\n" if name == "paragraphs" else "\n"
    text = f"3 bags of 4 are 12 apples.{gap}He eats 2, so 12 - 2 = 9.{end}"
    split = segmentation.SPLITTERS[name]
    answer, verdict = rollout(text), verifiers.exact(PROBLEM, text)
    critique = CritiqueParser(split, verifiers.exact)(f"<case>D</case>\n{RIGHT}", answer, verdict)
    assert isinstance(critique, Critique), critique
    assert [s.status for s in critique.steps] == ["kept", "fixed"]
    assert (critique.case, critique.first_error, critique.answer) == ("D", 1, "10")
    changed = first_change(
        CritiquedRollout(answer, verdict, critique), split(text), range(1, len(text) + 1)
    )
    assert changed is not None and (changed.step, changed.token) == (1, text.index("9."))
    # A critique in the rollout's format is as good.
    plain = text.replace("= 9", "= 10").replace("<answer>9", "<answer>10")
    assert CritiqueParser(split, verifiers.exact)(plain, answer, verdict) == critique


@given(st.text(max_size=300), st.booleans(), st.booleans())
def test_no_text_breaks_the_parser(text: str, finished: bool, cut: bool) -> None:
    assert isinstance(parse(text, finished=finished, cut=cut), Critique | CritiqueFailure)


PIECES = st.sampled_from(["<step_1>", "</step_1>", "<step_2>", "<answer>", "</answer>", "10", "a "])


@given(st.lists(PIECES, max_size=12), st.lists(PIECES, max_size=12))
def test_no_tags_break_the_parser(text: list[str], answer: list[str]) -> None:
    critique = parse("".join(text), "".join(answer))
    if isinstance(critique, Critique):
        assert critique.answer == "10" and critique.steps


def change(critique: Critique | CritiqueFailure, answer: str) -> FirstChange | None:
    critiqued = CritiquedRollout(rollout(answer), verifiers.exact(PROBLEM, answer), critique)
    ends = list(range(1, len(answer) + 1))  # a token per character
    return first_change(critiqued, segmentation.tags(answer), ends)


def test_the_first_change_by_hand() -> None:
    changed = change(parse(RIGHT), WRONG)
    assert changed is not None and (changed.step, changed.token) == (1, WRONG.index("9."))
    assert changed.fidelity == WRONG.index("9.") / len(WRONG)
    assert change(parse(RIGHT, RIGHT), RIGHT) == FirstChange(None, None, 1.0)
    only_answer = RIGHT.replace("<answer>10", "<answer>12")
    changed = change(parse(RIGHT, only_answer), only_answer)
    assert changed is not None and (changed.step, changed.token) == (
        2,
        only_answer.index("<answer>"),
    )
    assert change(CritiqueFailure("empty"), WRONG) is None


@pytest.mark.parametrize("name", ["tags", "lines", "lab"])
def test_gibberish_without_steps_repeats_nothing(name: str) -> None:
    for answer in ("blah blah blah", "blah\nblah " * 20, "so it is \\boxed{9}"):
        split = segmentation.lab if name == "lab" else segmentation.SPLITTERS[name]
        critiqued = CritiquedRollout(
            rollout(answer), verifiers.exact(PROBLEM, answer), parse(RIGHT, answer)
        )
        changed = first_change(critiqued, split(answer), range(1, len(answer) + 1))
        assert changed == FirstChange(0, 0, 0.0)


@pytest.mark.parametrize(
    ("before", "between", "after", "step"),
    [("Hm. ", "", "", 0), ("", " uh ", "", 1), ("", "", "!", 3)],
)
def test_text_outside_the_steps_is_not_repeated(
    before: str, between: str, after: str, step: int
) -> None:
    answer = before + RIGHT.replace("\n<step_2>", f"{between}\n<step_2>") + after
    changed = change(parse(RIGHT, answer), answer)
    at = 0 if before else answer.index("uh") if between else len(answer) - 1
    assert changed == FirstChange(step, at, at / len(answer))
    assert change(parse(RIGHT, f" {RIGHT}\n"), f" {RIGHT}\n") == FirstChange(None, None, 1.0)


def test_a_thought_counts_as_neither_repeated_nor_changed() -> None:
    critique = parse(RIGHT, WRONG)
    critiqued = CritiquedRollout(rollout(WRONG), verifiers.exact(PROBLEM, WRONG), critique)
    ends = [*[0] * 500, *range(1, len(WRONG) + 1)]
    changed = first_change(critiqued, segmentation.tags(WRONG), ends)
    at = WRONG.index("9.")
    assert changed == FirstChange(1, 500 + at, at / len(WRONG))
    empty = CritiquedRollout(rollout(""), verifiers.exact(PROBLEM, ""), parse(RIGHT, ""))
    assert first_change(empty, [], [0] * 500) == FirstChange(0, 499, 0.0)


def test_a_repetitive_step_is_compared_in_bounded_time() -> None:
    long = f"<step_1>{'a ' * 5000}</step_1><answer>9</answer>"
    reply = f"<step_1>{'a b ' * 2500}</step_1><answer>10</answer>"
    started = time.process_time()
    parse(reply, long)
    assert time.process_time() - started < 5


def test_a_step_number_of_thousands_of_digits_is_a_failure_not_an_error() -> None:
    assert outcome(parse(f"<step_{'1' * 5000}>a b</step_1>\n{RIGHT}")) != "A"
    assert isinstance(parse(f"<step_{'1' * 5000}>a b<answer>10</answer>"), CritiqueFailure)


def test_white_space_is_no_change() -> None:
    respaced = RIGHT.replace("3 bags", "3  bags").replace("12 - 2", "12 - 2 ")
    assert outcome(parse(respaced, RIGHT)) == "A"
    assert change(parse(respaced, RIGHT), RIGHT) == FirstChange(None, None, 1.0)
