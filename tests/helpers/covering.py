"""Chooses few of many combinations for `make test`; the others are for `make test-slow`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import pytest


def covering(first: Sequence[object], *others: Sequence[object]) -> list[Any]:
    """Return the product of values as parameters; those are marked slow that repeat other values.

    Each of the first values is in one fast combination, and each of the others in one, at least.
    """
    sizes = [len(values) for values in others]
    fast = {
        (i % len(first), *(_index(i, size, k) for k, size in enumerate(sizes, 1)))
        for i in range(max(len(first), *sizes))
    }
    return [
        pytest.param(
            *(values[i] for values, i in zip((first, *others), at, strict=True)),
            marks=() if at in fast else pytest.mark.slow,
        )
        for at in product(*(range(len(values)) for values in (first, *others)))
    ]


def _index(i: int, size: int, position: int) -> int:
    """Return the index of another value, shifted every round, so that no two lists go in step."""
    return (i + position * (i // size)) % size
