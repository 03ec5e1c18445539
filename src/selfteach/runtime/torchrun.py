"""Reads the environment variables that torchrun sets for this process; imports no torch."""

from __future__ import annotations

import os


def is_torchrun() -> bool:
    """Return True in a process started by torchrun, or by a launcher that sets the same variables."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def rank() -> int:
    """Return this process's rank, from 0; 0 without torchrun."""
    return int(os.environ["RANK"]) if is_torchrun() else 0


def local_rank() -> int:
    """Return this process's rank on its node, which is the index of its device; 0 without torchrun."""
    return int(os.environ.get("LOCAL_RANK", "0")) if is_torchrun() else 0


def is_main() -> bool:
    """Return True for the one process that prints."""
    return rank() == 0
