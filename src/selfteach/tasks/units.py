"""Compares the units that people write after numbers: ``hrs`` and ``hours``, ``km/h`` and ``kph``."""

from __future__ import annotations

import re
from functools import lru_cache

SPELLINGS = {
    "h": "hour hr", "min": "minute", "s": "second sec", "day": "", "wk": "week", "mo": "month",
    "yr": "year", "dollar": "usd buck", "cent": "", "euro": "eur", "rupee": "rs inr", "gbp": "",
    "degree": "deg °", "m": "meter metre", "cm": "centimeter centimetre",
    "mm": "millimeter millimetre", "km": "kilometer kilometre", "g": "gram gramme",
    "kg": "kilogram kilo", "mg": "milligram", "l": "liter litre", "ml": "milliliter millilitre",
    "in": "inch inche", "ft": "foot feet", "yd": "yard", "mi": "mile", "lb": "pound", "oz": "ounce",
    "^2": "square squared sq", "^3": "cubic cubed cu", "/": "per", "kph": "kmh", "am": "", "pm": "",
    "pt": "pint", "qt": "quart", "gal": "gallon", "tsp": "teaspoon", "tbsp": "tablespoon",
    "n": "newton", "j": "joule", "w": "watt", "v": "volt", "pa": "pascal", "hz": "hertz", "": "unit",
}  # fmt: skip
CANONICAL = {
    spelling: name
    for name, spellings in SPELLINGS.items()
    for spelling in (name, *spellings.split())
    if spelling
}
COMPOUND = {"mph": ("mi", "/", "h"), "kph": ("km", "/", "h"), "kmh": ("km", "/", "h")}
OPERATORS = frozenset({"/", "^2", "^3"})
TOKEN = re.compile(r"\^\s*\{?-?\d\}?|/|[^\s/^{}]+")
FILLERS = frozenset({"a", "an", "the", "of", "in", "each", "total", "long", "old", "away", "left"})


def is_unit(text: str) -> bool:
    """Return whether a text is a known unit, as ``cm`` or ``m/s``."""
    tokens = [_stem(token) for token in TOKEN.findall(text.casefold())]
    return bool(tokens) and all(
        token in CANONICAL or token in COMPOUND or token.startswith("^") for token in tokens
    )


def same_unit(gold: str, answer: str, *, may_lack: bool) -> bool:
    """Return whether two units are the same; with ``may_lack`` one of them may be left out.

    One may say more than the other (``red apples``, ``apples``), but no power and no ``per``.
    """
    a, b = _canonical(gold), _canonical(answer)
    if not b and not {"am", "pm"}.isdisjoint(a):  # half of a time of day
        return False
    if not a or not b:
        return may_lack or a == b
    if sorted(t for t in a if t in OPERATORS) != sorted(t for t in b if t in OPERATORS):
        return False
    names = [{t for t in tokens if t not in OPERATORS} for tokens in (a, b)]
    return names[0] <= names[1] or names[1] <= names[0]


@lru_cache(maxsize=2**12)
def _canonical(unit: str) -> tuple[str, ...]:
    tokens: list[str] = []
    pieces = TOKEN.findall(unit.casefold().replace(".", ""))
    for token in pieces:
        stem = _stem(token.strip(",;:!?()"))
        tokens += COMPOUND.get(stem, (CANONICAL.get(stem, stem),))
    named = [token for token in tokens if token not in FILLERS and token]
    # "in" is a unit where it is all that is there: 5 in, but 5 apples in total.
    return tuple(named or [token for token in tokens if token == "in"])


def _stem(token: str) -> str:
    token = re.sub(r"[\s{}]", "", token)
    if token in CANONICAL or token in COMPOUND or len(token) < 3:
        return token
    if token.endswith("ies") and len(token) > 4:
        return token[:-3] + "y"
    return token[:-1] if token.endswith("s") and not token.endswith("ss") else token
