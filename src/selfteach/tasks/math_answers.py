"""Reads final answers as formulas, quantities or words: wholly, or not at all.

math-verify looks for mathematics in a text and drops the rest: it reads ``7`` in ``7 hours 30 minutes``
and a product of letters in ``Tuesday``. So an answer is first split into numbers with units, words
and formulas; math-verify compares only formulas, and each part must agree.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from selfteach.tasks.answer_spelling import normalized
from selfteach.tasks.units import is_unit, same_unit

MAX_CHARS = 1_000
"""Characters of an answer that is read as mathematics; a longer one equals only the same text."""

COMMAND = r"\\(?:[A-Za-z]+\s*(?:\{[A-Za-z*]+\})?|.)"
MARKED = "\ue000[^\ue001]*\ue001"
POWER = r"(?:\s*\^\s*\{?-?\d\}?)?"
SEGMENT = re.compile(
    rf"(?P<words>{MARKED}{POWER})|(?P<command>{COMMAND})"
    rf"|(?P<letters>[^\W\d_](?:[^\W\d_]|[.'’-](?=[^\W\d_]))*\.?(?:\s*/\s*[^\W\d_]+)?){POWER}|(?P<other>.)",
    re.DOTALL,
)
TOKEN = re.compile(r"\\[A-Za-z]+|[^\W_]+|[-+*/^=<>!%]")
DATE = re.compile(r"\d{4}-\d{1,2}-\d{1,2}|\d{1,2}/\d{1,2}/\d{2,4}|\d{1,2}\.\d{1,2}\.\d{4}")
CLOCK = re.compile(r"\d{1,2}:[0-5]\d(?::[0-5]\d)?")
NO_UNITS = frozenset(
    {
        "not", "no", "is", "isn't", "are", "was", "if", "but", "maybe", "about",
        "approximately", "or", "so", "then", "therefore", "because", "since", "wrong",
        "except", "than", "nor", "either", "neither", "unless",
    }
)  # fmt: skip
"""Words that make a sentence of what they stand in."""
SHORT_WORDS = frozenset(
    {
        "no", "or", "is", "of", "to", "in", "at", "am", "pm", "on", "by", "if", "it", "as",
        "an", "so", "we", "he", "up", "us", "per",
    }
)  # fmt: skip
NAMES = frozenset(
    {
        "sin", "cos", "tan", "cot", "sec", "csc", "log", "exp", "max", "det", "gcd", "lcm",
        "mod", "lim", "arg", "deg", "dim", "ker", "inf", "sup", "sqrt", "arcsin", "arccos",
        "arctan", "sinh", "cosh", "tanh", "choose", "pi",
    }
)  # fmt: skip
"""Names of functions and constants, which are no words."""
MAX_UNIT_WORDS = 5


@dataclass(frozen=True, slots=True)
class Part:
    """Holds a formula (often a number) and the words after it (often a unit)."""

    formula: str
    words: str


@dataclass(frozen=True, slots=True)
class Reading:
    """Holds an answer as it is read."""

    tokens: tuple[str, ...]
    """The whole answer as words, numbers and signs, without case."""
    text: str
    """The whole answer without white space."""
    parts: tuple[Part, ...]
    """Its formulas and their units; empty where it is words or a sentence."""


@lru_cache(maxsize=2**14)  # gold answers recur in every rollout of a group
def read_answer(answer: str) -> Reading:
    """Split an answer into formulas with their units. Takes time linear in the answer."""
    if len(answer) > MAX_CHARS:
        return Reading(tuple(answer.split()), "".join(answer.split()), ())
    text = normalized(answer)
    bare = text.replace("\ue000", " ").replace("\ue001", " ")
    tokens = tuple(token.casefold() for token in TOKEN.findall(bare))
    return Reading(tokens, "".join(bare.split()), _parts(text))


def equivalent(gold: str, answer: str, equal: Callable[[str, str], bool]) -> bool:
    """Return whether two final answers are equal; ``equal`` compares formulas (gold first).

    A unit may be left out; where both answers have one, it must be the same. An answer of several
    quantities (``7 hours 30 minutes``) needs all of them, in order, with their units.
    """
    if gold.split() == answer.split():
        return True
    a, b = read_answer(gold), read_answer(answer)
    if a.text == b.text and a.text:
        return True
    if len(a.text.strip("()")) == 1 and a.tokens == b.tokens:  # a choice: (A), a
        return True
    if not a.parts or not b.parts:
        return a.tokens == b.tokens and bool(a.tokens)
    if len(a.parts) != len(b.parts):
        return False
    may_lack = len(a.parts) == 1
    return all(
        same_unit(x.words, y.words, may_lack=may_lack) and _same_value(x.formula, y.formula, equal)
        for x, y in zip(a.parts, b.parts, strict=True)
    )


def _same_value(gold: str, answer: str, equal: Callable[[str, str], bool]) -> bool:
    if "".join(gold.split()) == "".join(answer.split()):
        return True
    if DATE.fullmatch(gold) or DATE.fullmatch(answer):
        return False  # 2025-01-01 is no difference
    if CLOCK.fullmatch(gold) and CLOCK.fullmatch(answer):
        return False  # 12:30 and 2:05 are no ratios
    if "%" not in gold + answer:
        return equal(gold, answer)
    shares = [formula.rstrip(" \\%") for formula in (gold, answer)]
    if "%" in "".join(shares):
        return False
    if equal(*shares):  # 50 and 50% are often the same statement
        return True
    a, b = (
        rf"\frac{{{share}}}{{100}}" if "%" in formula else share
        for share, formula in zip(shares, (gold, answer), strict=True)
    )
    return (a, b) != tuple(shares) and equal(a, b)


def _parts(text: str) -> tuple[Part, ...]:
    """Return the formulas of an answer with the words after each; () if words come first, or alone.

    A sentence has no parts: it is compared as text.
    """
    parts: list[tuple[list[str], list[str]]] = [([], [])]
    for match in SEGMENT.finditer(text):
        formula, words = parts[-1]
        piece = match[0]
        if match.lastgroup == "words" or (
            match["letters"] and _is_words(match["letters"], formula)
        ):
            words.append(piece.replace("\ue000", " ").replace("\ue001", " "))
        elif words and not piece.strip(" ,;&\n\t"):
            words.append(" ")
        elif words:
            parts.append(([piece], []))
        else:
            formula.append(piece)
    read = tuple(Part(_trimmed("".join(f)), " ".join("".join(w).split())) for f, w in parts)
    whole = all(part.formula for part in read) and all(part.words for part in read[:-1])
    return read if whole and all(map(_is_quantity, read)) and len(read[-1:]) == 1 else ()


def _is_quantity(part: Part) -> bool:
    words = part.words.casefold().split()
    return len(words) <= MAX_UNIT_WORDS and NO_UNITS.isdisjoint(words)


def _is_words(letters: str, formula: list[str]) -> bool:
    """Return whether a run of letters is a word or a unit rather than a product of variables.

    A unit of one letter follows a number and a space: ``10 m/s``.
    """
    first = letters.split("/")[0].strip().rstrip(".")
    plain = first.replace(".", "").casefold()
    if plain in NAMES:
        return False
    if len(plain) == 1:
        before = "".join(formula[-2:])
        return is_unit(letters) and len(before) == 2 and before[0].isdigit() and before[1] == " "
    if is_unit(first) or plain in SHORT_WORDS or len(plain) > 3:
        return True
    return len(plain) == 3 and any(vowel in plain for vowel in "aeiou")


def _trimmed(formula: str) -> str:
    return formula.strip().strip(",;&").strip()
