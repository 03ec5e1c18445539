"""Token kinds are those of the word that a token belongs to."""

from __future__ import annotations

from itertools import accumulate

import pytest

from selfteach.commands.inspect.token_kinds import LISTS, STYLE_WORDS, token_kinds
from selfteach.tasks.lab.world import STYLES, SYMBOLS


def letters(*pieces: str, language: str = "english") -> list[str]:
    ends = list(accumulate(map(len, pieces)))
    return [kind[0] for kind in token_kinds("".join(pieces), ends, language)]  # type: ignore[arg-type]


def test_words_numbers_and_signs_have_their_kind() -> None:
    pieces = ["So", ",", " 3", " +", " x", " equals", " 12", ".", "5", " apples", "."]
    assert "".join(letters(*pieces)) == "sotttotttoo"


def test_all_tokens_of_a_word_have_its_kind() -> None:
    assert letters("Wa", "it") == ["s", "s"]
    assert letters(" there", "fore", " the", "refore", "d") == ["s", "s", "o", "o", "o"]
    assert letters("let", "'", "s", " go") == ["s", "s", "s", "o"]
    assert letters("let’", "s") == ["s", "s"]


def test_white_space_special_tokens_and_tags_are_other() -> None:
    assert letters("<", "step", "_", "1", ">", "\n", "so", "", " ") == [
        *"ooooo",
        "o",
        "s",
        "o",
        "o",
    ]
    assert letters("a", " I", " b") == ["o", "s", "t"]  # an article, a person, a variable


def test_latex_is_task() -> None:
    assert letters("$", "\\", "frac", "{", "1", "}", "{", "2", "}$") == ["t"] * 9


def test_thinking_tokens_are_other() -> None:
    assert token_kinds("so 1", [0, 0, 2, 4]) == ["other", "other", "style", "task"]
    assert token_kinds("", []) == []


def test_the_labs_style_symbols_are_listed() -> None:
    marks = {mark for style in STYLES.values() for mark in style.marks}
    assert set(LISTS["lab"]["marks"]) == {*marks, "!"}
    assert "".join(LISTS["lab"]["symbols"]) == SYMBOLS
    assert letters("0", " +", " a", " b", " =", " c", " #", " c", language="lab") == [*"osttstot"]


@pytest.mark.parametrize("word", ["wait", "so", "let", "therefore", "because", "hmm"])
def test_the_words_of_the_papers_are_listed(word: str) -> None:
    assert word in STYLE_WORDS


def test_no_word_is_listed_twice() -> None:
    words = [w for name in ("hesitation", "connective", "manner") for w in LISTS["english"][name]]
    assert len(words) == len(set(words)) and all(w == w.casefold() for w in words)
