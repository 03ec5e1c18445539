"""Test the spans of steps, in characters and in tokens."""

from __future__ import annotations

import itertools
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfteach.config.data_section import Steps
from selfteach.tasks import segmentation
from selfteach.tasks.lab import checker
from selfteach.tasks.lab.world import ROOT, STYLES, World, text_of


def pieces(text: str, spans: list[segmentation.Span]) -> list[str]:
    return [text[a:b] for a, b in spans]


def test_lines_skip_blank_ones_and_keep_their_spaces() -> None:
    text = "one\n\n  two \n \nthree"
    assert pieces(text, segmentation.lines(text)) == ["one", "  two ", "three"]
    assert segmentation.lines("") == segmentation.lines(" \n ") == []


def test_paragraphs_are_parted_by_blank_lines() -> None:
    text = "\n\none\nstill one\n \t\ntwo \n\n\n\\boxed{3}\n"
    assert pieces(text, segmentation.paragraphs(text)) == ["one\nstill one", "two ", "\\boxed{3}\n"]
    assert segmentation.paragraphs("") == segmentation.paragraphs(" \n\n ") == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("We add. Then we stop.", ["We add.", "Then we stop."]),
        ("Pi is 3.14, e.g. about 3. So 5! = 120 holds! Is it?",
         ["Pi is 3.14, e.g. about 3.", "So 5! = 120 holds!", "Is it?"]),
        ("It is 4. $x = 2$ then. \\(y\\) too.", ["It is 4.", "$x = 2$ then.", "\\(y\\) too."]),
        ("1. First this. 2) Then that.\n3. End",
         ["1. First this.", "2) Then that.", "3. End"]),
        ("**Done.** (Yes.)\n\nx", ["**Done.**", "(Yes.)", "x"]),
        ("no stop\n  next line", ["no stop", "next line"]),
        ("a", ["a"]),
        ("", []),
    ],
)  # fmt: skip
def test_sentences(text: str, expected: list[str]) -> None:
    assert pieces(text, segmentation.sentences(text)) == expected


@pytest.mark.parametrize("name", ["lines", "paragraphs", "sentences"])
@given(text=st.text(st.sampled_from("aB1 .!?\n$*)"), max_size=40))
def test_free_form_steps_leave_out_only_white_space(name: str, text: str) -> None:
    spans = segmentation.SPLITTERS[name](text)
    outside = [text[a:b] for a, b in itertools.pairwise([0, *itertools.chain(*spans), len(text)])]
    assert not any(gap.strip() for gap in outside[::2]) and all(p.strip() for p in outside[1::2])


def test_a_recipe_can_name_every_splitter() -> None:
    assert set(get_args(Steps)) == set(segmentation.SPLITTERS)


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
    assert pieces(text, segmentation.tags(text)) == expected


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("joint", ["\n", " "], ids=["lines", "one line"])
def test_lab_steps_are_the_checker_s(style: str, joint: str) -> None:
    world = World()
    question = next(world.questions("train"))
    text = text_of(world.solution(question, STYLES[style]), world.truth(question)[ROOT])
    text = text.replace("\n", joint)
    steps = pieces(text, segmentation.lab(text))
    assert [step.strip() for step in steps] == checker.split(text)
    assert len(steps) == 6 and steps[-1].startswith("#")


@given(st.text(st.sampled_from("01234 +=ab#\n"), max_size=40))
def test_lab_steps_cover_the_text_from_the_first_one_on(text: str) -> None:
    spans = segmentation.lab(text)
    if spans:
        assert "".join(pieces(text, spans)) == text[spans[0][0] :]
        assert spans[-1][1] == len(text)


def test_token_spans_by_hand() -> None:
    # "ab|c |de|f" as tokens that end at 2, 4, 6, 7; steps "abc" and "def" at 0-3 and 4-7.
    assert segmentation.token_spans([(0, 3), (4, 7)], [2, 4, 6, 7]) == [(0, 2), (2, 4)]
    # A token that begins in one step and ends in the next belongs to the next.
    assert segmentation.token_spans([(0, 3), (3, 7)], [2, 4, 7]) == [(0, 1), (1, 3)]
    # What comes before the first step belongs to none.
    assert segmentation.token_spans([(3, 7)], [2, 4, 7]) == [(1, 3)]
    assert segmentation.token_spans([], [2, 4]) == []
    # A special token decodes to nothing: it ends where its predecessor does.
    assert segmentation.token_spans([(0, 2), (2, 4)], [2, 4, 4]) == [(0, 1), (1, 3)]


@st.composite
def segmented_texts(draw) -> tuple[list[segmentation.Span], list[int]]:
    length = draw(st.integers(1, 30))
    cuts = sorted(draw(st.sets(st.integers(0, length - 1), min_size=1)))
    spans = list(zip(cuts, [*cuts[1:], length], strict=True))
    ends = [*sorted(draw(st.sets(st.integers(1, length)))), length]
    return spans, ends


@given(segmented_texts())
def test_token_spans_leave_no_token_out_and_share_none(
    case: tuple[list[segmentation.Span], list[int]],
) -> None:
    spans, ends = case
    token_spans = segmentation.token_spans(spans, ends)
    covered = [i for a, b in token_spans for i in range(a, b)]
    assert covered == list(range(token_spans[0][0], len(ends)))
    for (start, stop), (a, b) in zip(spans, token_spans, strict=True):
        # A token's last character (end - 1) lies in the step the token is counted with.
        assert all(start <= ends[i] - 1 < stop for i in range(a, b))
