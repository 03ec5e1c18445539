"""When Python looks for garbage: seldom while commands import, as before once a model runs."""

import gc
import sys
from collections.abc import Iterator

import pytest
import torch

from selfteach import cli
from selfteach.runtime import gc_pause
from selfteach.runtime.torch_setup import settle

OWN = (1_234, 12, 13)


@pytest.fixture(autouse=True)
def _own_pace() -> Iterator[None]:
    before = gc.get_threshold()
    gc.set_threshold(*OWN)
    yield
    gc.set_threshold(*before)


def test_rest_is_over_when_a_model_is_about_to_run() -> None:
    gc_pause.rest()
    gc_pause.rest()  # a command within a command changes nothing
    assert gc.get_threshold() == (gc_pause.SELDOM, *OWN[1:]) and gc.isenabled()
    settle(torch.device("cpu"))
    assert gc.get_threshold() == OWN


def test_whoever_does_not_ask_keeps_their_pace() -> None:
    gc_pause.rest()
    gc_pause.resume()
    gc.set_threshold(4_321, 9, 9)  # another than was kept for a rest
    settle(torch.device("cpu"))
    assert gc.get_threshold() == (4_321, 9, 9)


def test_commands_ask_for_rest(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["selfteach", "--version"])
    cli.main()
    assert capsys.readouterr().out.startswith("selfteach ")
    assert gc.get_threshold()[0] == gc_pause.SELDOM
