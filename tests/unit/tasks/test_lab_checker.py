"""Test the step checker: what counts as a step, a line, and an error."""

from __future__ import annotations

import pytest

from selfteach.tasks.lab import checker
from selfteach.tasks.lab.checker import check, parse_answer, parse_line, split, style_of
from selfteach.tasks.lab.world import STYLES, SYMBOLS, SolutionLine, World, text_of

WORLD = World()
QUESTION = next(WORLD.questions("train"))
TRUTH = WORLD.truth(QUESTION)


def other(symbol: str) -> str:
    return SYMBOLS[(SYMBOLS.index(symbol) + 1) % len(SYMBOLS)]


def solution(style: str = "plus") -> list[SolutionLine]:
    return WORLD.solution(QUESTION, STYLES[style])


def errors(text: str) -> list[str | None]:
    return [step.error for step in check(WORLD, QUESTION, text).steps]


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("joint", ["\n", " "], ids=["lines", "one line"])
def test_a_true_solution_has_no_error(style: str, joint: str) -> None:
    text = text_of(solution(style), TRUTH[4]).replace("\n", joint)
    checked = check(WORLD, QUESTION, text)
    assert errors(text) == [None] * 5
    assert checked.first_error is None and checked.answer == TRUTH[4]


@pytest.mark.parametrize("at", range(5))
def test_a_wrong_value_is_an_error_of_its_step(at: int) -> None:
    texts = [str(line) for line in solution()]
    texts[at] = texts[at][:-1] + other(solution()[at].c)
    checked = check(WORLD, QUESTION, "\n".join(texts))
    assert checked.first_error == at and checked.steps[at].error == "value"


def test_a_right_lookup_from_a_wrong_value_is_wrong_too() -> None:
    lines = solution()
    wrong = other(lines[0].c)
    carried = WORLD.table[wrong, lines[1].c]
    text = text_of([*(lines[1:2]), SolutionLine(0, STYLES["plus"], lines[0].a, lines[0].b, wrong),
                    SolutionLine(2, STYLES["plus"], wrong, lines[1].c, carried)], None)  # fmt: skip
    expected = [None, "value", None if carried == TRUTH[2] else "value"]
    assert errors(text) == expected


def test_a_repeated_early_or_swapped_node_is_a_bookkeeping_error() -> None:
    lines = solution()
    assert errors(text_of([lines[0], lines[0]], None)) == [None, "bookkeeping"], "a node twice"
    assert errors(str(lines[2])) == ["bookkeeping"], "before the nodes it needs"
    swapped = SolutionLine(0, STYLES["plus"], lines[0].b, lines[0].a, lines[0].c)
    if swapped.a != swapped.b:
        assert errors(str(swapped)) == ["bookkeeping"], "operands the wrong way round"


@pytest.mark.parametrize(
    "text",
    ["0 + a b c", "0 + a b > c", "0 * a b = c", "0 + a b = cc", "0 + a b = 1", "0 a + b = c", "0"],
)
def test_a_step_that_does_not_parse_is_an_error_of_form(text: str) -> None:
    assert parse_line(text) is None
    assert errors(text)[0] == "form"


def test_a_node_outside_the_tree_begins_no_step() -> None:
    assert parse_line("5 + a b = c") is None
    assert split("0 + a b = c 5 + a b = c") == ["0 + a b = c 5 + a b = c"]


def test_a_formatted_line_parses_to_the_same_line() -> None:
    for style in STYLES.values():
        line = SolutionLine(3, style, "d", "p", "a")
        assert parse_line(str(line)) == line


def test_a_flagged_line_is_not_a_solver_s_line() -> None:
    assert parse_line(str(SolutionLine(3, STYLES["plus"], "d", "p", "a", flagged=True))) is None


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("0 + a b = c\n# k", "k"),
        ("# k", "k"),
        ("#  k \n", "k"),
        ("# k # m", "m"),
        ("0 + a b = c", None),
        ("# ", None),
        ("# 1", None),
        ("# k l", None),
        ("", None),
    ],
)
def test_the_answer_is_what_follows_the_last_mark(text: str, answer: str | None) -> None:
    assert parse_answer(text) == answer
    assert check(WORLD, QUESTION, text).answer == answer


def test_text_before_the_first_node_is_a_step_of_bad_form() -> None:
    first = str(solution()[0])
    assert errors(f"hello {first}") == ["form", None]


def test_style_of_is_the_majority_and_the_earliest_of_equals() -> None:
    plus, minus = STYLES["plus"], STYLES["minus"]

    def style(*styles):
        steps = [checker.CheckedStep("", SolutionLine(0, s, "a", "b", "c"), None) for s in styles]
        return style_of(steps, default=minus)

    assert style(minus, plus, plus) is plus
    assert style(plus, minus) is plus and style(minus, plus) is minus
    assert style() is minus
