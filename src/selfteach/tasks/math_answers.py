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
TOKEN = re.compile(r"\\[A-Za-z]+|\d+(?:\.\d+)*|(?<!\w)\.\d+|[^\W\d_]+|[^\s\w,;.:'\"“”\\{}&~]")
"""Matches what a sentence is made of: without stops, braces and quotes, with brackets and signs."""
VERBATIM = re.compile(
    r"\d{1,2}/\d{1,2}/\d{2,4}"  # a date
    r"|\d+(?:-\d+)+"  # a date, a range, a number of a telephone or a page
    r"|\d+(?:\.\d+){2,}"  # a date, a version, an address
    r"|\d+(?:\.\d+)?(?: ?: ?\d+(?:\.\d+)?){2,}"  # a ratio of three, a time with seconds
    r"|0[xX][0-9A-Fa-f]+|0[bB][01]+|0[oO][0-7]+"
)
"""Matches what looks like a computation and is none: it equals only the same text."""
SEQUENCE = re.compile(r"(?<![A-Za-z] )(?<![\w.^_])\d[\d.]* +\d")
"""Matches numbers beside one another, which are no product: ``1 2 3``, ``(1 2)(3 4)``."""
INNER_SPACE = re.compile(
    r"\s+(?![^\W_])|(?<![^\W_])\s+|(?<=\d)\s+(?=[^\W\d_])|(?<=[^\W\d_])\s+(?=\d)"
)
"""Matches white space that does not keep two words or two numbers apart."""
RELATION = re.compile(r"(?<![<>!=\\:])=(?!=)|\\approx\b")
CONDITION = re.compile(
    r"\bfor (?:[a-z]\b|all|each [a-z]\b|every|any|some|odd|even|positive|negative|large|small|real)"
)
CLOCK = re.compile(r"\d{1,2}:[0-5]\d(?::[0-5]\d)?")
NO_UNITS = frozenset(
    {
        "not", "no", "is", "isn't", "are", "was", "if", "but", "maybe", "about",
        "approximately", "or", "so", "then", "therefore", "because", "since", "wrong",
        "except", "than", "nor", "either", "neither", "unless", "when", "where", "whenever",
        "given", "provided", "assuming", "least", "most", "otherwise", "although",
        "negative", "below", "factorial", "nan", "halves", "thirds", "fourths", "fifths",
        "sixths", "sevenths", "eighths", "ninths", "tenths", "hundredths", "thousandths",
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
MAX_ELEMENTS = 16
"""Elements of a list, some of them equal, that are compared in any order."""
NUMBER_BEFORE = re.compile(r"(?:\A|[^_])\d \Z")
CHOICE = re.compile(r"\(?([^()])\)|([^()])")
BRACKETS = ("(", "[", "{", r"\{", r"\left")
LETTER = re.compile("[A-Za-z]")
COMMAND_NAME = re.compile(r"\\[A-Za-z]+")


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
    """The whole answer, with white space only between two words or numbers."""
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
    return Reading(tokens, INNER_SPACE.sub("", bare), _parts(text))


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
    choices = [CHOICE.fullmatch(reading.text.casefold()) for reading in (a, b)]
    letters = [choice and (choice[1] or choice[2]) for choice in choices]
    if letters[0] is not None and letters[0] == letters[1]:  # (A), A), a
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
    if VERBATIM.fullmatch(gold) or VERBATIM.fullmatch(answer):
        return gold.casefold() == answer.casefold()  # 2025-01-01 is no difference
    if CLOCK.fullmatch(gold) and CLOCK.fullmatch(answer):
        return False  # 12:30 and 2:05 are no ratios
    if "%" not in gold + answer:
        return _all_sides(gold, answer, equal)
    shares = [formula.removesuffix("%").rstrip(" \\") for formula in (gold, answer)]
    if "%" in "".join(shares):
        return False
    if equal(*shares):  # 50 and 50% are often the same statement
        return True
    a, b = (
        rf"\frac{{{share}}}{{100}}" if "%" in formula else share
        for share, formula in zip(shares, (gold, answer), strict=True)
    )
    return (a, b) != tuple(shares) and equal(a, b)


def _all_sides(gold: str, answer: str, equal: Callable[[str, str], bool]) -> bool:
    """Return whether formulas are equal; of a computation (``3 + 4 = 7``) every side must be.

    Of what is only approximately equal (``\\sqrt{2} \\approx 1.41``) one side is enough.
    """
    sides = [side.strip() for side in RELATION.split(answer)]
    if len(sides) == 1 or RELATION.search(gold):
        if len(sides) == 1 and RELATION.search(gold) and not _has_letters(gold):
            return _all_sides(answer, gold, lambda a, b: equal(b, a))  # 2 + 3 = 5
        return _same_elements(gold, answer, equal)
    if not all(sides):
        return sides[0] == "" and all(sides[1:]) and _all_sides(gold, "=".join(sides[1:]), equal)
    if _has_letters(sides[0]):  # x = 7, x = 3 + 4 = 7
        if len(sides) == 2:
            return equal(gold, answer)
        sides = sides[1:]
    return (any if "\\approx" in answer else all)(equal(gold, side) for side in sides)


def _has_letters(formula: str) -> bool:
    return LETTER.search(COMMAND_NAME.sub("", formula)) is not None


def _same_elements(gold: str, answer: str, equal: Callable[[str, str], bool]) -> bool:
    """Return whether formulas are equal; a list without brackets has each element as often.

    math-verify reads such a list as a set, in which 1, 1, 2 and 1, 2 are the same.
    """
    a, b = _elements(gold), _elements(answer)
    if r"\pm" in gold + answer or r"\mp" in gold + answer or len(a) == len(b) == 1:
        return equal(gold, answer)
    if len(a) != len(b) and not gold.startswith(BRACKETS) and not answer.startswith(BRACKETS):
        return False
    if len(set(a)) == len(a) and len(set(b)) == len(b):
        return equal(gold, answer)
    if len(a) != len(b) or len(a) > MAX_ELEMENTS:
        return len(a) == len(b) and all(map(equal, a, b))
    remaining = [*b]
    for element in a:
        match = next((other for other in remaining if equal(element, other)), None)
        if match is None:
            return False
        remaining.remove(match)
    return not remaining


def _elements(formula: str) -> list[str]:
    """Return the elements of a list without brackets; one for any other formula."""
    elements, depth = [""], 0
    for character in formula:
        depth += (character in "([{") - (character in ")]}")
        if character in ",;" and depth == 0:
            elements.append("")
        else:
            elements[-1] += character
    return [element.strip() for element in elements]


def _parts(text: str) -> tuple[Part, ...]:
    """Return the formulas of an answer with the words after each; () if words come first, or alone.

    A sentence has no parts: it is compared as text.
    """
    parts: list[tuple[list[str], list[str]]] = [([], [])]
    for match in SEGMENT.finditer(text):
        formula, words = parts[-1]
        piece = match[0]
        if match.lastgroup == "words" or (
            match["letters"] and _is_words(match["letters"], formula, match[0])
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
    if SEQUENCE.search(part.formula) or CONDITION.search(part.words.casefold()):
        return False
    if " ".join(words) in ("squared", "cubed", "^2", "^3"):
        return False
    return len(words) <= MAX_UNIT_WORDS and NO_UNITS.isdisjoint(words)


def _is_words(letters: str, formula: list[str], whole: str) -> bool:
    """Return whether a run of letters is a word or a unit rather than a product of variables.

    A unit of one letter follows a number and a space: ``10 m/s``. ``whole`` has the power too.
    """
    first = letters.split("/")[0].strip().rstrip(".")
    plain = first.replace(".", "").casefold()
    if plain in NAMES:
        return False
    if len(plain) == 1:
        return is_unit(letters) and NUMBER_BEFORE.search("".join(formula[-3:])) is not None
    if is_unit(first) or len(plain) > 3:
        return True
    if plain in SHORT_WORDS:  # but v + at^2 is a sum
        return whole == letters and "".join(formula).rstrip()[-1:] not in tuple("+-*/^=({_")
    return len(plain) == 3 and any(vowel in plain for vowel in "aeiou")


def _trimmed(formula: str) -> str:
    return formula.strip().strip(",;&").strip()
