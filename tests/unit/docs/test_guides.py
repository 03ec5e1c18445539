"""What the guides say can be typed: recipes are accepted, commands are known."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path

import pytest
import typer
import yaml

from selfteach import cli
from selfteach.config.recipe import Recipe
from selfteach.config.schema import merge, validate

ROOT = Path(__file__).parents[3]
NAMES = ("planning", "one_gpu", "one_node", "many_nodes", "mixed_hardware", "hosted_critics")
CONTEXT = {"context": {"type": "reference"}}


def blocks(language: str) -> list[tuple[str, str]]:
    found = []
    for name in NAMES:
        text = (ROOT / "docs" / f"{name}.md").read_text()
        found += [(name, b) for b in re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)]
    return found


@pytest.mark.parametrize("block", [pytest.param(block, id=name) for name, block in blocks("toml")])
def test_recipes_are_accepted(block: str) -> None:
    validate(Recipe, merge(CONTEXT, tomllib.loads(block)))


COMMANDS = [
    (name, re.sub(r"^.*-m selfteach", "selfteach", line))
    for name, block in blocks("")
    for line in block.splitlines()
    if re.match(r"selfteach |torchrun .*-m selfteach", line)
]


@pytest.mark.parametrize(("name", "line"), COMMANDS)
def test_commands_parse(name: str, line: str) -> None:
    words = shlex.split(line)[1:]
    group = typer.main.get_command(cli.app)
    command = group.commands[words[0]]  # type: ignore[attr-defined]
    command.make_context(words[0], words[1:])


def test_files_that_guides_name_are_there() -> None:
    for name in NAMES:
        text = (ROOT / "docs" / f"{name}.md").read_text()
        for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
            assert (ROOT / "docs" / link).exists(), f"{name}.md: {link}"
        for path in re.findall(r"experiments/[\w/]+\.(?:toml|sh|sbatch|yaml)", text):
            assert (ROOT / path).exists(), f"{name}.md: {path}"


def test_kubernetes_is_yaml() -> None:
    text = (ROOT / "experiments" / "launch" / "kubernetes.yaml").read_text()
    assert [part["kind"] for part in yaml.safe_load_all(text)] == ["Deployment", "Service", "Job"]
