"""Names of contexts on a command line, also labels with commas."""

from __future__ import annotations

import pytest

from selfteach.commands.inspect.context_names import context_names
from selfteach.config.recipe import CONTEXTS

LABEL = "parts.py:shown(share=0.5, last=2)"


@pytest.mark.parametrize(
    ("values", "names"),
    [
        (["reference, step_aligned"], ("reference", "step_aligned")),
        (["reference", "step_aligned"], ("reference", "step_aligned")),
        ([f"reference,{LABEL},holistic"], ("reference", LABEL, "holistic")),
        (["p.py:f(names=['a, b)', \"c\"])", "x"], ("p.py:f(names=['a, b)', \"c\"])", "x")),
        (["p.py:f(text=a (b, c)"], ("p.py:f(text=a (b, c)",)),
        ([""], ("",)),
    ],
)
def test_commas_in_brackets_belong_to_a_name(values: list[str], names: tuple[str, ...]) -> None:
    assert context_names(values) == names


def test_all_is_every_context_but_none_and_the_dial() -> None:
    assert set(context_names(["all"])) == {*CONTEXTS} - {"none", "partly_aligned"}
    assert context_names(["all", LABEL])[-1] == LABEL
