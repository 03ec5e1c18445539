"""Shapes that signatures state are checked in tests, in every module that states some."""

import tomllib
from pathlib import Path

import pytest
import torch
from jaxtyping import TypeCheckError

from selfteach.losses.divergence import forward_kl

SOURCE = Path("src")


def test_every_module_that_states_shapes_is_hooked() -> None:
    options = tomllib.loads(Path("pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    (option,) = (w for w in options["addopts"].split() if w.startswith("--jaxtyping-packages="))
    *hooked, checker = option.partition("=")[2].split(",")
    stating = [
        ".".join(path.relative_to(SOURCE).with_suffix("").parts)
        for path in SOURCE.rglob("*.py")
        if "from jaxtyping import" in path.read_text(encoding="utf-8")
    ]
    assert sorted(stating) == sorted(hooked) and checker == "beartype.beartype"


def test_a_wrong_shape_is_refused() -> None:
    with pytest.raises(TypeCheckError, match="teacher"):
        forward_kl(torch.zeros(2, 3), torch.zeros(2, 4))
