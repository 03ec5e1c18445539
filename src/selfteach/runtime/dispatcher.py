"""Chooses which server of a fleet gets a request: bookkeeping alone, which sends nothing itself.

The members of a fleet serve the same model. A request goes to the least loaded member, or to one that
has served the beginning of its prompt before, unless that one is much busier. A member that has failed
is taken out until a probe of it succeeds. Nothing here may change a result: which member serves a
request decides how long it takes, and no more.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice, takewhile

AFFINITY_FACTOR, AFFINITY_SLACK = 1.5, 4
"""A member is preferred for what it has in its prefix cache up to a load of so many times the least
loaded one's, and so many requests more."""
MAX_BLOCKS = 2**15
"""Blocks of prompts that are remembered of each member."""
WINDOW = 128
"""Requests that wait, the first ones, among which a member finds one whose prompt it has."""
RECENT = 64
"""Replies whose seconds make up the median."""
MIN_RECENT = 5
"""Replies before there is a median."""


def prefix_blocks(prompt: str | tuple[int, ...], size: int) -> tuple[int, ...]:
    """Return a hash of each beginning of a prompt that ends with a block of so many letters or tokens.

    Two prompts have as many equal hashes, from the first on, as they have blocks in common.
    """
    hashes, before = [], 0
    for at in range(0, len(prompt), size):
        before = hash((before, prompt[at : at + size]))
        hashes.append(before)
    return tuple(hashes)


@dataclass(slots=True)
class MemberCounts:
    """Counts what a member did: requests it was sent, seconds of these, and how many of them failed."""

    requests: int = 0
    seconds: float = 0.0
    failures: int = 0


@dataclass(slots=True)
class FleetMember:
    """Holds what is known of one server."""

    name: str
    in_flight: int = 0
    out: str | None = None
    """Why it gets no requests; None if it is available."""
    rests_until: float = 0.0
    """When a server that was busy may be asked again, in seconds of the clock."""
    counts: MemberCounts = field(default_factory=MemberCounts)
    """Since they were last read."""
    mean_seconds: float = 0.0
    """Running mean of its replies' seconds; 0 before the first."""
    blocks: OrderedDict[int, None] = field(default_factory=OrderedDict)
    """Beginnings of prompts that it has served, the last used at the end."""

    def matches(self, prefix: Sequence[int]) -> int:
        """Return how many blocks of a prompt it has served before."""
        count = 0
        for block in prefix:
            if block not in self.blocks:
                break
            count += 1
        return count

    def remember(self, prefix: Sequence[int]) -> None:
        """Note that it has served this prompt, and forget what it has not served for long."""
        for block in prefix:
            self.blocks[block] = None
            self.blocks.move_to_end(block)
        while len(self.blocks) > MAX_BLOCKS:
            self.blocks.popitem(last=False)


class Dispatcher:
    """Assigns requests to members, by index; may be used from any thread.

    Every `assign_one` that returns a member is followed by one `finish` of that member.
    """

    def __init__(
        self, names: Sequence[str], capacity: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._members = [FleetMember(name) for name in names]
        self._capacity, self._clock = capacity, clock
        self._recent: deque[float] = deque(maxlen=RECENT)
        self._common: tuple[int, ...] | None = None
        """Blocks with which all prompts begin."""
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._members)

    def assign(
        self, prefix: Sequence[int] = (), avoid: Collection[int] = (), *, hedge: bool = False
    ) -> int | None:
        """Return the member that gets a request, or None: `assign_one` with one request that waits."""
        assigned = self.assign_one([(prefix, avoid)], hedge=hedge)
        return None if assigned is None else assigned[1]

    def assign_one(
        self, waiting: Iterable[tuple[Sequence[int], Collection[int]]], *, hedge: bool = False
    ) -> tuple[int, int] | None:
        """Return which of the requests that wait is sent now, and to which member.

        It is in flight there from now on. Each has a prefix and members to avoid, which get it only if
        no other one is available, and no ``hedge``, for which a member may have one request more. A
        request waits for a busy member that has its prefix while there is another for who is free. None
        if all members have as many requests as they may have, rest, or are out.
        """
        with self._lock:
            first: tuple[int, int, Sequence[int]] | None = None
            for position, (prefix, avoid) in enumerate(islice(waiting, WINDOW)):
                wish, free = self._wish(prefix, avoid, hedge)
                if wish is not None and wish == free:
                    return self._sent(position, wish, prefix)
                if free is not None and first is None:
                    first = position, free, prefix
            return None if first is None else self._sent(*first)

    def expect(self, prefix: Sequence[int]) -> None:
        """Note a prompt that will be sent: what all prompts begin with says nothing of a member."""
        with self._lock:
            if self._common is None:
                self._common = tuple(prefix)
            pairs = zip(self._common, prefix, strict=False)
            same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
            self._common = self._common[:same]

    def _sent(self, position: int, index: int, prefix: Sequence[int]) -> tuple[int, int]:
        self._members[index].in_flight += 1
        self._members[index].remember(prefix)
        return position, index

    def _wish(
        self, prefix: Sequence[int], avoid: Collection[int], hedge: bool
    ) -> tuple[int | None, int | None]:
        """Return the member that a request should go to, and the one of those with room.

        Load is requests in flight, this one included, times how slow a member's replies are.
        """
        members, now = self._members, self._clock()
        available = [i for i, member in enumerate(members) if member.out is None]
        preferred = [i for i in available if i not in avoid]
        candidates = [
            i for i in (preferred if preferred or hedge else available)
            if members[i].rests_until <= now
        ]  # fmt: skip
        free = [i for i in candidates if members[i].in_flight < self._capacity + hedge]
        if not free:
            return None, None
        fastest = min((m.mean_seconds for m in members if m.mean_seconds), default=1.0)
        load = {
            i: (members[i].in_flight + 1) * (members[i].mean_seconds or fastest) for i in candidates
        }
        common = len(self._common or ())
        matches = {i: max(0, members[i].matches(prefix) - common) for i in candidates}
        least = min(free, key=lambda i: (load[i], i))
        longest = min(candidates, key=lambda i: (-matches[i], load[i], i))
        most = AFFINITY_FACTOR * load[least] + AFFINITY_SLACK * fastest
        if matches[longest] <= matches[least] or load[longest] > most:
            longest = least
        return longest, longest if longest in free else least

    def finish(
        self, index: int, seconds: float, *, failed: bool = False, unused: bool = False
    ) -> None:
        """Note that a request is no longer in flight; ``unused`` if another member was faster."""
        with self._lock:
            member = self._members[index]
            member.in_flight -= 1
            counts = member.counts
            counts.requests += 1
            counts.seconds += seconds
            counts.failures += failed
            if not failed and not unused:
                self._recent.append(seconds)
                before = member.mean_seconds or seconds
                member.mean_seconds = 0.9 * before + 0.1 * seconds

    def take_out(self, index: int, reason: str) -> bool:
        """Send a member no more requests; False if it was out already, whose reason stays."""
        with self._lock:
            member = self._members[index]
            if member.out is not None:
                return False
            member.out = reason
            member.blocks.clear()
            return True

    def put_back(self, index: int) -> None:
        """Make a member available again."""
        with self._lock:
            self._members[index].out = None
            self._members[index].rests_until = 0.0

    def rest(self, index: int, seconds: float) -> None:
        """Send a busy member nothing for so long."""
        with self._lock:
            until = self._clock() + seconds
            member = self._members[index]
            member.rests_until = max(member.rests_until, until)

    def forget_prefixes(self) -> None:
        """Forget who has which prompts cached: new weights have emptied all caches."""
        with self._lock:
            for member in self._members:
                member.blocks.clear()

    def name(self, index: int) -> str:
        """Return a member's name in messages."""
        return self._members[index].name

    def is_out(self, index: int) -> bool:
        """Return True if a member gets no requests."""
        return self._members[index].out is not None

    @property
    def any_available(self) -> bool:
        """Return True if a member is not out."""
        return any(member.out is None for member in self._members)

    @property
    def out(self) -> Mapping[int, str]:
        """Return why members are out, by index."""
        with self._lock:
            return {i: m.out for i, m in enumerate(self._members) if m.out is not None}

    @property
    def median_seconds(self) -> float | None:
        """Return the median of the last replies' seconds; None before there are some."""
        with self._lock:
            return statistics.median(self._recent) if len(self._recent) >= MIN_RECENT else None

    def read_counts(self) -> list[MemberCounts]:
        """Return what each member did since this was last called."""
        with self._lock:
            counts = [member.counts for member in self._members]
            for member in self._members:
                member.counts = MemberCounts()
            return counts


def member_metrics(prefix: str, counts: Sequence[MemberCounts]) -> dict[str, float]:
    """Return the metrics of a fleet's members, numbered by their place in the recipe."""
    metrics: dict[str, float] = {}
    for index, member in enumerate(counts):
        metrics[f"{prefix}/{index}/requests"] = member.requests
        metrics[f"{prefix}/{index}/seconds"] = member.seconds
        metrics[f"{prefix}/{index}/failures"] = member.failures
    return metrics
