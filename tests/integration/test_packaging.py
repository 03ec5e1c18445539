"""The package installs from wheel and sdist with each of its extras, at the locked versions."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import venv
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCK = {
    package["name"]: package for package in tomllib.loads((ROOT / "uv.lock").read_text())["package"]
}
EXTRAS = sorted(set(PROJECT["optional-dependencies"]) - {"dev"})
PINS = dict(
    line.lower().replace("_", "-").split("==")
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if "==" in line
)


def run(command: Sequence[str | Path], **options: object) -> str:
    done = subprocess.run(command, capture_output=True, text=True, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def required(specification: str) -> tuple[str, frozenset[str]]:
    """Return the name and the version bounds of a requirement."""
    name, _, bounds = re.fullmatch(r"([\w.-]+)(\[[^]]*])?(.*)", specification).groups()  # type: ignore[union-attr]
    return name.lower(), frozenset(bounds.split(","))


def test_the_lock_file_is_of_this_pyproject() -> None:
    locked = LOCK["selfteach"]["metadata"]
    assert set(locked["provides-extras"]) == set(PROJECT["optional-dependencies"])
    rows = {
        (row["name"], frozenset(row.get("specifier", "").split(",")))
        for row in locked["requires-dist"]
    }
    lists = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    named = {required(item) for items in lists for item in items}
    assert {row for row in named if row[0] != "selfteach"} <= rows, "run: uv lock"


def test_the_lock_file_has_the_tested_versions() -> None:
    differing = {
        name: (pin, LOCK[name]["version"] if name in LOCK else None)
        for name, pin in PINS.items()
        if name.replace(".", "-") not in LOCK or LOCK[name.replace(".", "-")]["version"] != pin
    }
    assert not differing, "constraints.txt and uv.lock differ"


def test_the_dockerfile_passes_its_linter() -> None:
    linter = shutil.which("hadolint", path=str(Path(sys.executable).parent))
    if linter is None:
        pytest.skip("hadolint is not installed")
    run([linter, ROOT / "Dockerfile"])


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Build a wheel and an sdist from tracked files."""
    folder = tmp_path_factory.mktemp("dist")
    run(["git", "clone", "-q", ROOT, folder / "clone"])
    run([sys.executable, "-m", "build", "-o", folder, folder / "clone"])
    return {
        "wheel": next(iter(folder.glob("*.whl"))),
        "sdist": next(iter(folder.glob("*.tar.gz"))),
    }


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_it_installs_into_an_empty_environment(
    kind: str, distributions: dict[str, Path], tmp_path: Path
) -> None:
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv/bin/python"
    pip = [python, "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt"]
    for extra in EXTRAS:  # each resolves by itself
        run([*pip, "--dry-run", f"{distributions[kind]}[{extra}]"])
    run([*pip, f"{distributions[kind]}[{','.join(EXTRAS)}]"])
    run([python, "-m", "pip", "check"])
    selfteach = tmp_path / "venv/bin/selfteach"
    assert "train" in run([selfteach, "--help"], cwd=tmp_path)
    assert "rollouts" in run([selfteach, "check", "paper_in_miniature"], cwd=tmp_path)


@pytest.mark.slow
def test_an_image_is_built_where_there_is_a_builder() -> None:
    docker = shutil.which("docker")
    if docker is None or subprocess.run([docker, "info"], capture_output=True).returncode:
        pytest.skip("no Docker daemon")
    run([docker, "build", "--tag", "selfteach-test", ROOT])
    assert "train" in run([docker, "run", "--rm", "selfteach-test", "--help"])
