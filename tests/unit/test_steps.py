"""Where steps begin and end, in characters and in tokens."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfteach import steps
from selfteach.lab import checker
from selfteach.lab.world import ROOT, STYLES, World, text_of


def pieces(text: str, spans: list[steps.Span]) -> list[str]:
    return [text[a:b] for a, b in spans]


def test_lines_skip_blank_ones_and_keep_their_own_spaces() -> None:
    text = "one\n\n  two \n \nthree"
    assert pieces(text, steps.lines(text)) == ["one", "  two ", "three"]
    assert steps.lines("") == steps.lines(" \n ") == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "<step_1>a\nb</step_1>\n<step_2>c</step_2><answer>d</answer>",
            ["<step_1>a\nb</step_1>", "<step_2>c</step_2>", "<answer>d</answer>"],
        ),
        ("hm <step_1>a</step_1> and <answer>d</answer> bye",
         ["<step_1>a</step_1>", "<answer>d</answer>"]),
        ("<step_1>a <step_2>b</step_2>", ["<step_1>a ", "<step_2>b</step_2>"]),
        ("<step_1>a<answer>d", ["<step_1>a", "<answer>d"]),
        ("<step_1>cut in the mid", ["<step_1>cut in the mid"]),
        ("<step_12>x</step_12>", ["<step_12>x</step_12>"]),
        ("no tags, 1 < 2", []),
        ("", []),
    ],
)  # fmt: skip
def test_tags(text: str, expected: list[str]) -> None:
    assert pieces(text, steps.tags(text)) == expected


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("joint", ["\n", " "], ids=["lines", "one line"])
def test_lab_steps_are_the_checker_s(style: str, joint: str) -> None:
    world = World()
    question = next(world.questions("train"))
    text = text_of(world.solution(question, STYLES[style]), world.truth(question)[ROOT])
    text = text.replace("\n", joint)
    found = pieces(text, steps.lab(text))
    assert [piece.strip() for piece in found] == checker.split(text)
    assert len(found) == 6 and found[-1].startswith("#")


@given(st.text(st.sampled_from("01234 +=ab#\n"), max_size=40))
def test_lab_steps_cover_the_text_from_the_first_one_on(text: str) -> None:
    spans = steps.lab(text)
    if spans:
        assert "".join(pieces(text, spans)) == text[spans[0][0] :]
        assert spans[-1][1] == len(text)


def test_token_spans_by_hand() -> None:
    # "ab|c |de|f" as tokens that end at 2, 4, 6, 7; steps "abc" and "def" at 0-3 and 4-7.
    assert steps.token_spans([(0, 3), (4, 7)], [2, 4, 6, 7]) == [(0, 2), (2, 4)]
    # A token that begins in one step and ends in the next belongs to the next.
    assert steps.token_spans([(0, 3), (3, 7)], [2, 4, 7]) == [(0, 1), (1, 3)]
    # What comes before the first step belongs to none.
    assert steps.token_spans([(3, 7)], [2, 4, 7]) == [(1, 3)]
    assert steps.token_spans([], [2, 4]) == []
    # A special token decodes to nothing: it ends where its predecessor does.
    assert steps.token_spans([(0, 2), (2, 4)], [2, 4, 4]) == [(0, 1), (1, 3)]


@st.composite
def segmentation(draw) -> tuple[list[steps.Span], list[int]]:
    length = draw(st.integers(1, 30))
    cuts = sorted(draw(st.sets(st.integers(0, length - 1), min_size=1)))
    spans = list(zip(cuts, [*cuts[1:], length], strict=True))
    ends = [*sorted(draw(st.sets(st.integers(1, length)))), length]
    return spans, ends


@given(segmentation())
def test_token_spans_leave_no_token_out_and_share_none(
    case: tuple[list[steps.Span], list[int]],
) -> None:
    spans, ends = case
    found = steps.token_spans(spans, ends)
    covered = [i for a, b in found for i in range(a, b)]
    assert covered == list(range(found[0][0], len(ends)))
    for (start, stop), (a, b) in zip(spans, found, strict=True):
        # A token's last character (end - 1) lies in the step the token is counted with.
        assert all(start <= ends[i] - 1 < stop for i in range(a, b))
