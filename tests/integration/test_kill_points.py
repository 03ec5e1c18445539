"""A run that is killed at any change of a file ends, once resumed, as if it had not been killed."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from same_run import assert_same_end
from tiny_runs import tiny_recipe

from selfteach.config.recipe import Recipe
from selfteach.trainer.loop import run_to_end

CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree")
KILLED = 137


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


@pytest.mark.slow
@pytest.mark.parametrize("way", ["one step after another", "sampling ahead"])
def test_every_kill_point(
    tmp_path: Path, way: str, record_property: Callable[[str, object], None]
) -> None:
    """Counted in docs/reliability.md."""
    settings = tiny_recipe() if way.startswith("one") else tiny_recipe(train={"staleness": 1})
    whole, count = tmp_path / "whole" / "run", tmp_path / "count"
    assert run_killed(settings, whole, None, count) == 0
    points = int(count.read_text())
    for point in range(1, points + 1):
        folder = tmp_path / "killed" / "run"
        assert run_killed(settings, folder, point, count) == KILLED, point
        run_to_end(settings, folder)
        assert_same_end(folder, whole)
        shutil.rmtree(folder.parent)
    assert points > 50
    record_property("kill points", points)
