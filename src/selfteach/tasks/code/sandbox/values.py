"""Encodes plain values as JSON that keeps Python's types, and decodes them to exact built-in types.

What crosses between the answer's process and the judge is data: a decoded value has the methods of a
built-in type, whatever the answer did to its own. Other objects stay where they are and are named by
a number (`encode` calls ``keep``).
"""

from __future__ import annotations

import datetime
import math
from collections import deque
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

MAX_DECIMAL_BITS = 10_000
"""Integers with more bits are written in hexadecimal, which takes linear time."""
KEYS = type({}.keys())
DAY, CLOCK = ("year", "month", "day"), ("hour", "minute", "second", "microsecond")
MOMENTS: dict[type, tuple[str, ...]] = {
    datetime.date: DAY,
    datetime.time: CLOCK,
    datetime.datetime: DAY + CLOCK,
    datetime.timedelta: ("days", "seconds", "microseconds"),
}
"""Types of dates and times, and the attributes that make one anew."""
MUTABLE = (list, dict, set, bytearray, deque)
"""Types of values that a function can change."""
PROTOCOLS = ("__call__", "__iter__", "__next__", "__len__", "__getitem__")
"""Methods of an object's class that tests can use."""
KEY = "#"
"""The key that marks an encoded value of another type than JSON's."""


def encode(value: Any, keep: Callable[[Any], int]) -> Any:
    """Return a JSON-able form of a value; tuples, sets, dicts, bytes and big integers are tagged.

    Values of subclasses (named tuples, counters, enumerations of integers) become those of the built-in
    type. Raises `RecursionError` for what contains itself.
    """
    kind = type(value)
    if value is None or kind is bool or kind is str:
        return value
    if isinstance(value, int):
        plain = int.__int__(value)  # of an enumeration too
        return plain if plain.bit_length() <= MAX_DECIMAL_BITS else {KEY: "int", "v": hex(plain)}
    if isinstance(value, float):
        plain = float.__float__(value)
        return plain if math.isfinite(plain) else {KEY: "float", "v": repr(plain)}
    return _encode_tagged(value, keep)


def _encode_tagged(value: Any, keep: Callable[[Any], int]) -> Any:
    def each(iterator: Any) -> list[Any]:
        return [encode(one, keep) for one in iterator]

    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, list):
        return each(list.__iter__(value))
    if isinstance(value, tuple):
        return {KEY: "tuple", "v": each(tuple.__iter__(value))}
    if isinstance(value, dict):
        pairs = dict.items(value)
        return {KEY: "dict", "v": [[encode(k, keep), encode(v, keep)] for k, v in pairs]}
    if isinstance(value, set):
        return {KEY: "set", "v": each(set.__iter__(value))}
    if isinstance(value, frozenset):
        return {KEY: "frozenset", "v": each(frozenset.__iter__(value))}
    if isinstance(value, bytes | bytearray):
        return {KEY: "bytes" if isinstance(value, bytes) else "bytearray", "v": value.hex()}
    if isinstance(value, deque):
        return {KEY: "deque", "v": [each(deque.__iter__(value)), deque.maxlen.__get__(value)]}
    if type(value) is KEYS:
        return {KEY: "keys", "v": each(value)}
    if type(value) in MOMENTS:
        return _encode_moment(value, keep)
    if type(value) is complex:
        return {KEY: "complex", "v": [each([value.real]), each([value.imag])]}
    if type(value) is range:
        return {KEY: "range", "v": each([value.start, value.stop, value.step])}
    if type(value) is Fraction:
        return {KEY: "fraction", "v": each([value.numerator, value.denominator])}
    if type(value) is Decimal:
        return {KEY: "decimal", "v": str(value)}
    return _encode_object(value, keep)


def _encode_object(value: Any, keep: Callable[[Any], int]) -> Any:
    bases = [type.__dict__["__dict__"].__get__(base) for base in _MRO.__get__(type(value))]
    methods = [name for name in PROTOCOLS if any(name in base for base in bases)]
    return {KEY: "object", "v": keep(value), "type": _name_of(value), "can": methods}


def _encode_moment(value: Any, keep: Callable[[Any], int]) -> Any:
    """Encode a date, time or difference of times; one with a time zone stays an object."""
    if getattr(value, "tzinfo", None) is not None:
        return _encode_object(value, keep)
    return {KEY: type(value).__name__, "v": [getattr(value, name) for name in MOMENTS[type(value)]]}


_MRO = type.__dict__["__mro__"]


def _name_of(value: Any) -> str:
    name = type.__dict__["__name__"].__get__(type(value))
    return str(name)[:80]


def decode(data: Any, revive: Callable[[int, str, list[str]], Any]) -> Any:
    """Return the value of an encoded form; ``revive`` makes a stand-in for an object.

    It is called with the object's number, the name of its type, and its methods of `PROTOCOLS`.

    Raises `ValueError`, `TypeError` or `KeyError` for what `encode` does not write.
    """
    if isinstance(data, list):
        return [decode(one, revive) for one in data]
    if not isinstance(data, dict):
        return data
    kind, content = data[KEY], data["v"]
    if kind == "object":
        return revive(int(content), str(data["type"]), [n for n in PROTOCOLS if n in data["can"]])
    if kind == "dict":
        return {decode(key, revive): decode(value, revive) for key, value in content}
    if kind in COLLECTIONS:
        return COLLECTIONS[kind](decode(one, revive) for one in content)
    if kind == "complex":
        (real,), (imaginary,) = content
        return complex(decode(real, revive), decode(imaginary, revive))
    if kind in TUPLES:
        return TUPLES[kind](*(decode(one, revive) for one in content))
    return ATOMS[kind](content)


TUPLES: dict[str, Callable[..., Any]] = {
    "range": range,
    "fraction": Fraction,
    "deque": lambda elements, longest: deque(elements, longest),
    **{kind.__name__: kind for kind in MOMENTS},
}
COLLECTIONS: dict[str, Any] = {
    "tuple": tuple, "set": set, "frozenset": frozenset,
    "keys": lambda keys: dict.fromkeys(keys).keys(),
}  # fmt: skip
ATOMS: dict[str, Callable[[Any], Any]] = {
    "int": lambda text: int(text, 16),
    "float": float,
    "bytes": bytes.fromhex,
    "bytearray": bytearray.fromhex,
    "decimal": Decimal,
}


def shown(value: Any, limit: int = 300) -> str:
    """Return a value as a person would write it, shortened; of a big integer its number of bits."""
    try:
        text = repr(value)
    except ValueError:  # more digits than Python writes
        bits = value.bit_length() if isinstance(value, int) else 0
        text = f"an integer of {bits} bits" if bits else f"a {type(value).__name__} of big integers"
    except RecursionError:
        text = f"a {type(value).__name__} nested too deeply to show"
    return text if len(text) <= limit else text[:limit] + "…"
