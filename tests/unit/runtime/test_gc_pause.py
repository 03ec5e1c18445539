"""Garbage collection runs rarely while commands import, and as before once a model runs."""

import gc
import sys
from collections.abc import Iterator

import pytest
import torch

from selfteach import cli
from selfteach.runtime import gc_pause
from selfteach.runtime.torch_setup import configure_torch

THRESHOLDS = (1_234, 12, 13)


@pytest.fixture(autouse=True)
def _test_thresholds() -> Iterator[None]:
    before = gc.get_threshold()
    gc.set_threshold(*THRESHOLDS)
    yield
    gc.set_threshold(*before)


def test_collection_resumes_before_a_model_runs() -> None:
    gc_pause.pause()
    gc_pause.pause()  # a command within a command changes nothing
    assert gc.get_threshold() == (gc_pause.PAUSED_THRESHOLD, *THRESHOLDS[1:]) and gc.isenabled()
    configure_torch(torch.device("cpu"))
    assert gc.get_threshold() == THRESHOLDS


def test_without_a_pause_thresholds_stay() -> None:
    gc_pause.pause()
    gc_pause.resume()
    gc.set_threshold(4_321, 9, 9)  # not those from before the pause
    configure_torch(torch.device("cpu"))
    assert gc.get_threshold() == (4_321, 9, 9)


def test_commands_pause_collection(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["selfteach", "--version"])
    cli.main()
    assert capsys.readouterr().out.startswith("selfteach ")
    assert gc.get_threshold()[0] == gc_pause.PAUSED_THRESHOLD
