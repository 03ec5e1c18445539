"""Calls the command line as a shell does, and writes recipes with a critic at a server."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from selfteach import cli

Call = Callable[..., tuple[int, str, str]]
"""Runs a command of these words; returns its exit status, and what it printed and reported."""


def caller(patch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Return what calls `selfteach`: the body of the fixture ``call``."""

    def call(*words: object) -> tuple[int, str, str]:
        patch.setattr("sys.argv", ["selfteach", *map(str, words)])
        try:
            cli.main()
        except SystemExit as stop:
            return (int(stop.code or 0), *capsys.readouterr())
        return (0, *capsys.readouterr())

    return call


def exit_status(patch: pytest.MonkeyPatch, *words: object) -> int:
    """Run the console script in this process with these words; return its exit status."""
    patch.setattr("sys.argv", ["selfteach", *map(str, words)])
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def served_critic_recipe(
    path: Path, *, model: str | Path, url: str, cache: Path, data: str = 'type = "files"',
    critic: str = "",
) -> Path:  # fmt: skip
    """Write a recipe whose critic is the model ``m`` at a server; more keys as lines of TOML."""
    path.write_text(f"""
[model]
path = "{model}"
[data]
{data}
[context]
type = "step_aligned"
[critic]
type = "endpoint"
base_url = "{url}"
model = "m"
reply_cache = "{cache}"
{critic}
""")
    return path
