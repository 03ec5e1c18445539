"""What coding agents are told about the command line is true: commands, options and files exist."""

from __future__ import annotations

import re
from pathlib import Path

import typer

from selfteach import cli

ROOT = Path(__file__).parents[3]
TEXT = (ROOT / "llms.txt").read_text(encoding="utf-8")
COMMANDS = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]


def test_every_command_is_named_and_exists() -> None:
    named = set(re.findall(r"`selfteach ([a-z-]+)", TEXT))
    others = re.search(r"`selfteach sweep`, (.*): `selfteach COMMAND", TEXT)
    assert others is not None
    named |= set(re.findall(r"`([a-z-]+)`", others[1]))
    assert named == set(COMMANDS)


def test_options_are_those_of_their_commands() -> None:
    calls = [call for call in re.findall(r"`(selfteach [^`]*)`", TEXT) if "COMMAND" not in call]
    calls += ["selfteach check --offline", "selfteach check --show-prompts"]
    for call in calls:
        known = {option for p in COMMANDS[call.split()[1]].params for option in p.opts}
        assert set(re.findall(r"--[a-z-]+", call)) <= known, call


def test_links_lead_to_files() -> None:
    for target in re.findall(r"\]\(([^)#]+)", TEXT):
        assert (ROOT / target).exists(), target
