"""Test the world: its tree, styles, splits and beliefs."""

from __future__ import annotations

from itertools import islice

import pytest

from selfteach.tasks.lab.world import (
    BELIEFS,
    CHILDREN,
    ROOT,
    STYLES,
    SYMBOLS,
    SolutionLine,
    World,
    WorldConfig,
    is_ready,
    operands,
    split_of,
    text_of,
)

WORLD = World()


def test_the_truth_is_five_lookups_by_hand() -> None:
    x = ("a", "b", "c", "d", "e", "f")
    f = WORLD.table
    n0, n1, n3 = f["a", "b"], f["c", "d"], f["e", "f"]
    n2 = f[n0, n1]
    assert WORLD.truth(x) == (n0, n1, n2, n3, f[n2, n3])


def test_a_world_depends_on_its_seed_alone() -> None:
    again, other = World(WorldConfig(seed=0)), World(WorldConfig(seed=1))
    assert again.table == WORLD.table and again.misconceptions == WORLD.misconceptions
    assert other.table != WORLD.table


def test_the_weak_share_is_exact_and_no_misconception_is_right() -> None:
    assert len(WORLD.table) == 256
    assert len(WORLD.misconceptions) == round(0.30 * 256)
    assert all(wrong != WORLD.table[pair] for pair, wrong in WORLD.misconceptions.items())
    # No other setting changes the table: worlds differ in beliefs, not in the truth.
    assert World(WorldConfig(weak_share=0.1)).table == WORLD.table


def test_author_solve_rate_by_hand() -> None:
    question = next(WORLD.questions("train"))
    truth = WORLD.truth(question)
    weak = sum(operands(node, question, truth) in WORLD.misconceptions for node in range(5))
    beliefs = BELIEFS["hard"]
    expected = beliefs.truth**weak * beliefs.known ** (5 - weak)
    assert WORLD.author_solve_rate(question) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("style", STYLES.values(), ids=lambda style: style.name)
def test_solutions_respect_the_tree_and_end_in_the_truth(style) -> None:
    question = next(WORLD.questions("train"))
    lines = WORLD.solution(question, style)
    done: dict[int, str] = {}
    for line in lines:
        assert is_ready(line.node, done)
        assert (line.a, line.b) == operands(line.node, question, done)
        done[line.node] = line.c
    assert tuple(done[node] for node in range(5)) == WORLD.truth(question)
    assert [line.node for line in lines] == list(style.order)


def test_the_text_of_lines() -> None:
    plus, minus, angle = STYLES["plus"], STYLES["minus"], STYLES["angle"]
    assert str(SolutionLine(0, plus, "a", "b", "c")) == "0 + a b = c"
    assert str(SolutionLine(3, minus, "a", "b", "c")) == "3 - a b > c"
    assert str(SolutionLine(1, angle, "a", "b", "c")) == "1 < b a : c"
    assert str(SolutionLine(4, plus, "g", "e", "h", flagged=True)) == "4 + g e ! h"
    assert text_of([SolutionLine(0, plus, "a", "b", "c")], "k") == "0 + a b = c\n# k"
    assert text_of([], None) == ""


def test_styles_differ_in_order_and_marks() -> None:
    orders = [style.order for style in STYLES.values()]
    assert len(set(orders)) == len({order[0] for order in orders}) == len(STYLES)
    marks = [mark for style in STYLES.values() for mark in style.marks]
    assert len(set(marks)) == len(marks), "a mark that two styles share would hide the style"


@pytest.mark.parametrize("seed", [None, 3, 10])
def test_splits_are_disjoint_for_any_seed(seed: int | None) -> None:
    sets = {
        split: set(islice(WORLD.questions(split, seed), 300))
        for split in ("train", "validation", "test")
    }
    for split, questions in sets.items():
        assert len(questions) == 300, "a stream repeats no question"
        assert {split_of(q) for q in questions} == {split}
        assert all(len(q) == 6 and set(q) <= set(SYMBOLS) for q in questions)


def test_streams_are_reproducible_and_differ_by_seed_and_split() -> None:
    def take(split, seed=None):
        return list(islice(WORLD.questions(split, seed), 20))

    assert take("train") == take("train")
    assert take("train", 1) == take("train", 1) != take("train", 2)


def test_one_question_in_eight_is_validation_and_one_in_eight_test() -> None:
    pool = [(a, b, c, "a", d, "p") for a in SYMBOLS for b in SYMBOLS for c in SYMBOLS for d in "ab"]
    counts = dict.fromkeys(("train", "validation", "test"), 0)
    for question in pool:
        counts[split_of(question)] += 1
    # 8,192 draws of 1/8: 1,024, standard deviation 30.
    assert counts["validation"] == pytest.approx(1024, abs=150)
    assert counts["test"] == pytest.approx(1024, abs=150)


def test_every_symbol_of_a_question_affects_its_split() -> None:
    for position in range(6):
        varied = [["a"] * position + [s] + ["a"] * (5 - position) for s in SYMBOLS]
        assert len({split_of(question) for question in varied}) > 1, position


def test_a_stream_repeats_no_question() -> None:
    # 15,000 draws from 12.6 million would repeat about nine.
    questions = list(islice(WORLD.questions("train"), 15_000))
    assert len(set(questions)) == len(questions)


def test_the_tree_is_the_documented_one() -> None:
    assert CHILDREN[ROOT] == ("n2", "n3") and CHILDREN[2] == ("n0", "n1")
    assert not is_ready(2, {0: "a"}) and is_ready(2, {0: "a", 1: "b"})
    assert not is_ready(0, {0: "a"}), "a node is written once"
