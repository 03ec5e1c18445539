"""A run that is killed at any change of a file ends, once resumed, as if it had not been killed."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from selfteach.config.recipe import Recipe
from selfteach.config.schema import merge, validate
from selfteach.runtime.run_folder import RunFolder, load_result
from selfteach.trainer.loop import run_to_end

TINY = {
    "model": {"path": "lab:two_styles"},
    "data": {"type": "lab", "train": 8, "validation": 2, "test": 2},
    "sampling": {"max_tokens": 40, "batch_size": 8},
    "critic": {"type": "oracle"},
    "context": {"type": "step_aligned"},
    "train": {
        "steps": 3, "problems_per_step": 2, "group_size": 4, "checkpoint_every": 2, "threads": 1,
    },
    "evaluation": {"every": 2, "validation_k": 1, "test_k": 1},
}  # fmt: skip
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree")
KILLED = 137


def recipe(**changes: object) -> Recipe:
    return validate(Recipe, merge(TINY, changes), where="test")


def is_change(event: str, args: tuple[object, ...], root: str) -> bool:
    """Return whether an audit event is a change of a file below ``root``."""
    if event == "open":
        path, mode, _ = args
        return (
            str(path).startswith(root)
            and isinstance(mode, str)
            and set(mode) & set("wax+") != set()
        )
    return event in CHANGES and str(args[0]).startswith(root)


def run_killed(settings: Recipe, folder: Path, point: int | None, count: Path) -> int | None:
    """Run in a forked process that ends at once before change number ``point``, counted from 1."""

    def work() -> None:
        seen = 0

        def hook(event: str, args: tuple[object, ...]) -> None:
            nonlocal seen
            if is_change(event, args, str(folder)):
                seen += 1
                if seen == point:
                    os._exit(KILLED)

        sys.addaudithook(hook)
        run_to_end(settings, folder)
        count.write_text(str(seen))
        os._exit(0)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join()
    return process.exitcode


def end_of(folder: Path) -> tuple[object, ...]:
    """Return all that a run says, but for clocks."""
    clocks = ("time/", "active_", "waiting", "overlap")
    rows = [
        {name: value for name, value in row.items() if not name.startswith(clocks)}
        for row in RunFolder(folder).metrics()
    ]
    result = load_result(folder)
    result["budget"].pop("seconds")
    return result, rows


@pytest.mark.slow
@pytest.mark.parametrize("way", ["one step after another", "sampling ahead"])
def test_every_kill_point(
    tmp_path: Path, way: str, record_property: Callable[[str, object], None]
) -> None:
    """Counted in docs/reliability.md."""
    settings = recipe() if way.startswith("one") else recipe(train={"staleness": 1})
    whole, count = tmp_path / "whole" / "run", tmp_path / "count"
    assert run_killed(settings, whole, None, count) == 0
    points = int(count.read_text())
    expected, weights = end_of(whole), load_file(whole / "model" / "model.safetensors")
    for point in range(1, points + 1):
        folder = tmp_path / "killed" / "run"
        assert run_killed(settings, folder, point, count) == KILLED, point
        run_to_end(settings, folder)
        assert end_of(folder) == expected, point
        ours = load_file(folder / "model" / "model.safetensors")
        assert all(torch.equal(value, weights[name]) for name, value in ours.items()), point
        shutil.rmtree(folder.parent)
    assert points > 50
    record_property("kill points", points)
