"""Test the alignment dial: the same look-ups, with more or less of the answer's phrasing and order."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfteach.tasks.lab import alignment_dial, lab_oracle
from selfteach.tasks.lab.checker import check, parse_line, unflagged
from selfteach.tasks.lab.corpus import references
from selfteach.tasks.lab.world import REFERENCE_STYLE, STYLES, World, text_of
from selfteach.types import Critique

WORLD = World()
QUESTION = ("c", "a", "f", "f", "e", "d")


def critique(style: str, at: int | None) -> Critique:
    """Critique the true solution with a wrong value in line ``at``."""
    lines = WORLD.solution(QUESTION, STYLES[style])
    texts = [str(line) for line in lines]
    if at is not None:
        texts[at] = texts[at][:-1] + ("a" if lines[at].c != "a" else "b")
    return lab_oracle.critique_rollout(WORLD, QUESTION, "\n".join([*texts, "# p"]))


def flags(*steps: int) -> list[bool]:
    return [bool(step) for step in steps]


def partly_aligned(trace: Critique, reference: str, keep: list[bool]) -> str:
    """Return the steps and the answer as a context shows them."""
    steps = alignment_dial.partly_aligned(trace, reference, keep).steps
    return "\n".join([*(step.text for step in steps), f"# {trace.answer}"])


def lines_not_in_reference_style(shown: str) -> list[str]:
    return [text for text in shown.splitlines() if f" {REFERENCE_STYLE.marks[0]} " not in text]


def test_a_replaced_step_takes_the_reference_s_order_and_the_others_stay() -> None:
    """Critique in the order 3 1 0 2 4; only 3 and 4 are retained. The reference has 1 0 3 2 4."""
    trace = critique("minus", at=3)
    shown = partly_aligned(trace, references(WORLD, QUESTION)["reference"], flags(1, 0, 0, 0, 1))
    lines = shown.splitlines()
    assert [text.split()[0] for text in lines[:-1]] == ["3", "1", "0", "2", "4"]
    assert [text.split()[1] for text in lines[:-1]] == ["-", "<", "<", "<", "-"]
    assert lines[0] == trace.steps[0].text and lines[4] == trace.steps[4].text


def test_a_retained_step_comes_after_its_operands() -> None:
    """Critique in the order 0 1 2 3 4 with only 0 and 2 retained: 1 must come before 2."""
    trace = critique("plus", at=None)
    shown = partly_aligned(trace, references(WORLD, QUESTION)["reference"], flags(1, 0, 1, 0, 0))
    assert [text.split()[0] for text in shown.splitlines()[:-1]] == ["0", "1", "2", "3", "4"]


@pytest.mark.parametrize("style", ["plus", "minus"])
@pytest.mark.parametrize("at", [None, 0, 2, 4])
def test_the_ends_of_the_dial_are_the_critique_and_the_reference(
    style: str, at: int | None
) -> None:
    trace, reference = critique(style, at), references(WORLD, QUESTION)["reference"]
    text = "\n".join([*(step.text for step in trace.steps), f"# {trace.answer}"])
    assert partly_aligned(trace, reference, [True] * 5) == text
    assert partly_aligned(trace, reference, [False] * 5) == reference


@given(
    style=st.sampled_from(["plus", "minus"]),
    at=st.sampled_from([None, 0, 1, 2, 3, 4]),
    keep=st.lists(st.booleans(), min_size=5, max_size=5),
)
def test_every_position_is_a_true_derivation(style: str, at: int | None, keep: list[bool]) -> None:
    trace = critique(style, at)
    shown = partly_aligned(trace, references(WORLD, QUESTION)["reference"], keep)
    bare = "\n".join(map(unflagged, shown.splitlines()))
    checked = check(WORLD, QUESTION, bare)
    assert checked.first_error is None and checked.answer == trace.answer
    assert len(lines_not_in_reference_style(shown)) - 1 == sum(keep)  # less the answer line
    solution = {str(line) for line in WORLD.solution(QUESTION, STYLES[style])}
    retained = {unflagged(s.text) for s, keeps in zip(trace.steps, keep, strict=True) if keeps}
    assert retained <= solution and retained <= set(bare.splitlines())


def test_a_flag_is_read_in_any_style() -> None:
    line = WORLD.solution(QUESTION, STYLES["minus"])[0]
    flagged = text_of([line], None).replace(">", "!")
    assert parse_line(flagged) is None and parse_line(unflagged(flagged)) == line
    assert unflagged("0 ? a b ! c") == "0 ? a b ! c"
