"""Spaces requests so that a server's limits per minute hold."""

from __future__ import annotations

import asyncio
import time

NAP_S = 0.25
"""Longest sleep between looks at what was returned."""


class RateLimit:
    """Spaces work of known size evenly: n units delay what follows by n minutes / ``per_minute``.

    Without bursts, so that no minute, wherever it begins, has more than the limit and one piece of
    work. Used from one event loop.
    """

    def __init__(self, per_minute: float | None) -> None:
        self._seconds = 60 / per_minute if per_minute else 0.0
        self._free_at = 0.0
        self._queue = asyncio.Lock()

    async def acquire(self, units: float) -> None:
        """Wait for the turn of so many units, in the order of the calls."""
        async with self._queue:
            while (now := time.monotonic()) < self._free_at:
                # In short naps: what is returned meanwhile shortens the wait.
                await asyncio.sleep(min(self._free_at - now, NAP_S))
            self._free_at = now + units * self._seconds

    def settle(self, units: float) -> None:
        """Add units that were used beyond those acquired, or return (negative) those that were not."""
        self._free_at += units * self._seconds
