"""What torchrun says of this process, from its environment; imports no torch."""

from __future__ import annotations

import os


def by_torchrun() -> bool:
    """True in a process that torchrun (or whoever sets the same variables) has started."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def rank() -> int:
    """Which of the ranks this is, from 0; 0 for a process on its own."""
    return int(os.environ["RANK"]) if by_torchrun() else 0


def local_rank() -> int:
    """Which of this node's ranks this is: the number of its device."""
    return int(os.environ.get("LOCAL_RANK", "0")) if by_torchrun() else 0


def is_main() -> bool:
    """True for the one process that talks."""
    return rank() == 0
