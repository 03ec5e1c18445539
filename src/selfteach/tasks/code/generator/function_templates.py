"""Reads templates of small functions to write, and fills them in."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

FILE = Path(__file__).with_name("functions.toml")
LEVELS = (1, 2, 3, 4)


@dataclass(frozen=True, slots=True)
class FunctionTask:
    """Holds a function to write, without its tests."""

    template: str
    level: int
    arguments: str
    inputs: tuple[str, ...]
    """The kind of each argument, a function of `random_inputs`."""
    sentence: str
    """What is to be written, without an example."""
    solutions: tuple[str, ...]
    """Programs in several styles; the first one's values are expected."""


@dataclass(frozen=True, slots=True)
class FunctionTemplate:
    """Describes a kind of function, with parameters in its text and its solutions."""

    name: str
    level: int
    arguments: str
    inputs: tuple[str, ...]
    returns: str
    solutions: tuple[str, ...]
    numbers: Mapping[str, Sequence[Any]]
    pools: tuple[str, ...]

    def filled(self, rng: np.random.Generator) -> FunctionTask:
        """Return a task with parameters drawn."""
        values = {name: str(_drawn(choices, rng)) for name, choices in self.numbers.items()}
        for pool in self.pools:
            entry = _drawn(_file()["pool"][pool], rng)
            inner = {key: str(_drawn(entry[key], rng)) for key in entry.keys() - {"words", "code"}}
            values[pool] = Template(entry["words"]).substitute(inner)
            values[f"{pool}_code"] = Template(entry["code"]).substitute(inner)
        returns = Template(self.returns).substitute(values)
        solutions = tuple(Template(one).substitute(values).strip() for one in self.solutions)
        sentence = f"Write a function `{self.name}({self.arguments})` that returns {returns}."
        return FunctionTask(self.name, self.level, self.arguments, self.inputs, sentence, solutions)


@cache
def function_templates() -> tuple[FunctionTemplate, ...]:
    """Return all templates."""
    return tuple(
        FunctionTemplate(
            row["name"], row["level"], row["arguments"], tuple(row["inputs"]), row["returns"],
            tuple(row["solutions"]), row.get("numbers", {}), tuple(row.get("pools", ())),
        )
        for row in _file()["function"]
    )  # fmt: skip


@cache
def _file() -> dict[str, Any]:
    return tomllib.loads(FILE.read_text(encoding="utf-8"))


def _drawn(choices: Sequence[Any], rng: np.random.Generator) -> Any:
    return choices[int(rng.integers(len(choices)))]
