"""Checks the members of a fleet of servers before a run: one that is down may be left out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from selfteach.errors import SelfteachError


class Addressed(Protocol):
    """Holds the settings of one server of a fleet."""

    @property
    def address(self) -> str:
        """Return the server's address, for messages."""
        ...


M = TypeVar("M", bound=Addressed)


def states_of_members(
    members: Sequence[M],
    check: Callable[[M], str],
    *,
    error: type[SelfteachError],
    unreachable: type[Exception],
) -> list[str]:
    """Return each member's address and the state that ``check`` returns for it.

    A member for which ``check`` raises ``unreachable`` passes if another one is reachable. Raises
    ``error`` in one line, with the errors of all members that cannot be used.
    """
    states, down, unfit = list[str](), list[str](), list[str]()
    for member in members:
        try:
            states.append(f"{member.address}: {check(member)}")
        except unreachable as reason:
            down.append(str(reason))
            states.append(f"{member.address}: down, left out until it replies")
        except error as reason:
            unfit.append(str(reason))
    if unfit or len(down) == len(states):
        raise error("; ".join(unfit or down))
    return states
