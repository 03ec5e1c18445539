"""Renamed recipe keys are printed once, as plain lines on stderr."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import pytest

from selfteach import cli
from selfteach.commands.notes import LOGGER, NoteHandler, notes_on_stderr

OLD_RECIPE = """
[data]
type = "lab"
train = 4
validation = 2
test = 1
[context]
type = "reference"
[train]
answers_per_problem = 2
[arms.one]
[arms.two]
train = { answers_per_problem = 4 }
"""
NOTE = "train.answers_per_problem is now train.group_size\n"


def test_an_old_key_is_one_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(OLD_RECIPE)
    monkeypatch.setattr(sys, "argv", ["selfteach", "check", str(recipe), "--offline"])
    cli.main()
    printed = capsys.readouterr()
    assert printed.err == f"note: {recipe}: {NOTE}"
    assert '"group_size": 2' in printed.out and '"group_size": 4' in printed.out
    logger = logging.getLogger(LOGGER)
    assert logger.propagate and not any(isinstance(h, NoteHandler) for h in logger.handlers)


def test_a_key_that_many_files_share_is_one_note(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger(LOGGER)
    with notes_on_stderr():
        for seed in range(3):
            logger.warning("%s%s is now %s", f"seed_{seed}: ", "train.old", "train.new")
        logging.getLogger(f"{LOGGER}.runtime.tracking").warning("tracking: %s fails", "wandb")
    assert capsys.readouterr().err == (
        "note: seed_0: train.old is now train.new\nnote: tracking: wandb fails\n"
    )


def test_only_the_main_rank_prints_notes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("selfteach.runtime.torchrun.is_main", lambda: False)
    with notes_on_stderr():
        logging.getLogger(LOGGER).warning("%s%s is now %s", "", "a", "b")
    assert capsys.readouterr().err == ""
