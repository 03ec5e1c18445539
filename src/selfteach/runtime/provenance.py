"""Collects the provenance of a run, a study or an inspection: commit, versions, machine."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


def collect_provenance() -> dict[str, Any]:
    """Return the commit, the versions of Python and packages, and the machine."""
    packages = ("selfteach", "torch", "transformers", "peft", "tokenizers", "numpy")
    return {
        "commit": commit(),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "versions": {name: _version(name) for name in packages},
    }


def cpu_capability() -> str:
    """Return the CPU's vector instructions that matrix products use; the last digits depend on them.

    Imports torch, which takes seconds: for processes that need it anyway.
    """
    import torch

    return torch.backends.cpu.get_cpu_capability()


def commit() -> str | None:
    """Return the commit of the source tree this runs from; None for an installed package."""
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
