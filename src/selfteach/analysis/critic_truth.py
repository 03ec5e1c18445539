"""Compare a critic's critiques with a program that checks every step, where the task has one.

A row is one of `commands.critique`: ``true_first_error`` is the index of the first wrong step by the
program, None if every step is right; ``critique.first_error`` is what the critic changed first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import sqrt
from typing import Any

from selfteach.evaluation.statistics import Interval

NORMAL_95 = 1.959964
"""Quantile of the normal distribution that bounds a 95 % interval."""


@dataclass(frozen=True, slots=True)
class CriticTruth:
    """Counts critiques by how they relate to the true first error.

    Critiques that failed are in ``faulty`` and ``sound`` only, not among the usable ones.
    """

    faulty: int
    """Rollouts with a wrong step."""
    faulty_usable: int
    """Of these, rollouts with a usable critique."""
    located: int
    """Usable critiques that change the first wrong step first."""
    early: int
    """Usable critiques that change a right step before the first wrong one."""
    late: int
    """Usable critiques that repeat the first wrong step."""
    sound: int
    """Rollouts without a wrong step."""
    sound_usable: int
    """Of these, rollouts with a usable critique."""
    alarms: int
    """Usable critiques of sound rollouts that change a step."""


def count_truth(rows: Iterable[Mapping[str, Any]]) -> CriticTruth | None:
    """Count rows by whether the critic located the first error; None without a checking program."""
    checked = [row for row in rows if "true_first_error" in row and row["critique"] is not None]
    if not checked:
        return None
    faulty = [row for row in checked if row["true_first_error"] is not None]
    sound = [row for row in checked if row["true_first_error"] is None]
    pairs = [(row["critique"]["first_error"], row["true_first_error"]) for row in _usable(faulty)]
    alarms = [row for row in _usable(sound) if row["critique"]["first_error"] is not None]
    return CriticTruth(
        faulty=len(faulty),
        faulty_usable=len(pairs),
        located=sum(critic == truth for critic, truth in pairs),
        early=sum(critic is not None and critic < truth for critic, truth in pairs),
        late=sum(critic is None or critic > truth for critic, truth in pairs),
        sound=len(sound),
        sound_usable=len(_usable(sound)),
        alarms=len(alarms),
    )


def share(count: int, of: int) -> Interval | None:
    """Return a share in 0..1 with Wilson's 95 % interval (JASA 22, 1927); None if ``of`` is 0."""
    if of == 0:
        return None
    p, z = count / of, NORMAL_95
    centre = (p + z * z / (2 * of)) / (1 + z * z / of)
    half = z / (1 + z * z / of) * sqrt(p * (1 - p) / of + z * z / (4 * of * of))
    return Interval(p, max(0.0, centre - half), min(1.0, centre + half))


def _usable(rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [row for row in rows if "reason" not in row["critique"]]
