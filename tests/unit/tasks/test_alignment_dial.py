"""The dial of alignment: the same look-ups, in words and places that are more or less the answer's."""

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
    """Of the true solution with a wrong value in one line."""
    lines = WORLD.solution(QUESTION, STYLES[style])
    texts = [str(line) for line in lines]
    if at is not None:
        texts[at] = texts[at][:-1] + ("a" if lines[at].c != "a" else "b")
    return lab_oracle.criticise(WORLD, QUESTION, "\n".join([*texts, "# p"]))


def kept(*steps: int) -> list[bool]:
    return [bool(step) for step in steps]


def partly_aligned(told: Critique, reference: str, keeps: list[bool]) -> str:
    """As a context shows it."""
    steps = alignment_dial.partly_aligned(told, reference, keeps).steps
    return "\n".join([*(step.text for step in steps), f"# {told.answer}"])


def own_lines(shown: str) -> list[str]:
    return [text for text in shown.splitlines() if f" {REFERENCE_STYLE.marks[0]} " not in text]


def test_a_step_that_is_not_kept_moves_to_the_reference_and_the_others_stay() -> None:
    """Critique in the order 3 1 0 2 4; only 3 and 4 are kept. The reference has 1 0 3 2 4."""
    told = critique("minus", at=3)
    shown = partly_aligned(told, references(WORLD, QUESTION)["reference"], kept(1, 0, 0, 0, 1))
    lines = shown.splitlines()
    assert [text.split()[0] for text in lines[:-1]] == ["3", "1", "0", "2", "4"]
    assert [text.split()[1] for text in lines[:-1]] == ["-", "<", "<", "<", "-"]
    assert lines[0] == told.steps[0].text and lines[4] == told.steps[4].text


def test_a_kept_step_waits_for_what_it_needs() -> None:
    """Critique in the order 0 1 2 3 4 with only 0 and 2 kept: 1 must stand before 2."""
    told = critique("plus", at=None)
    shown = partly_aligned(told, references(WORLD, QUESTION)["reference"], kept(1, 0, 1, 0, 0))
    assert [text.split()[0] for text in shown.splitlines()[:-1]] == ["0", "1", "2", "3", "4"]


@pytest.mark.parametrize("style", ["plus", "minus"])
@pytest.mark.parametrize("at", [None, 0, 2, 4])
def test_the_ends_of_the_dial_are_the_critique_and_the_reference(
    style: str, at: int | None
) -> None:
    told, reference = critique(style, at), references(WORLD, QUESTION)["reference"]
    trace = "\n".join([*(step.text for step in told.steps), f"# {told.answer}"])
    assert partly_aligned(told, reference, [True] * 5) == trace
    assert partly_aligned(told, reference, [False] * 5) == reference


@given(
    style=st.sampled_from(["plus", "minus"]),
    at=st.sampled_from([None, 0, 1, 2, 3, 4]),
    keeps=st.lists(st.booleans(), min_size=5, max_size=5),
)
def test_every_position_is_a_true_derivation(style: str, at: int | None, keeps: list[bool]) -> None:
    told = critique(style, at)
    shown = partly_aligned(told, references(WORLD, QUESTION)["reference"], keeps)
    bare = "\n".join(map(unflagged, shown.splitlines()))
    checked = check(WORLD, QUESTION, bare)
    assert checked.first_error is None and checked.answer == told.answer
    assert len(own_lines(shown)) - 1 == sum(keeps)  # the answer line is nobody's style
    solution = {str(line) for line in WORLD.solution(QUESTION, STYLES[style])}
    wanted = {unflagged(step.text) for step, keep in zip(told.steps, keeps, strict=True) if keep}
    assert wanted <= solution and wanted <= set(bare.splitlines())


def test_a_flag_is_read_in_any_style() -> None:
    line = WORLD.solution(QUESTION, STYLES["minus"])[0]
    flagged = text_of([line], None).replace(">", "!")
    assert parse_line(flagged) is None and parse_line(unflagged(flagged)) == line
    assert unflagged("0 ? a b ! c") == "0 ? a b ! c"
