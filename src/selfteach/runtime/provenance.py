"""What a run, a study or an inspection was made with."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


def environment() -> dict[str, Any]:
    """What a run was made with: commit, versions, machine."""
    packages = ("selfteach", "torch", "transformers", "peft", "tokenizers", "numpy")
    return {
        "commit": commit(),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "versions": {name: _version(name) for name in packages},
    }


def processor() -> str:
    """The vector instructions that products use: with others their last digits are others. Asks torch,
    which takes seconds to import: for processes that have it anyway."""
    import torch

    return torch.backends.cpu.get_cpu_capability()


def commit() -> str | None:
    """The commit of the source tree this runs from; None for an installed package."""
    here = Path(__file__).resolve().parent.parent
    if not (here.parents[1] / ".git").exists():
        return None
    command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
